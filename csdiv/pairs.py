"""Two mixtures on their way to an operator: checked, of one dtype, and the formula that their covariances take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csdiv import autograd, backends, ops, reference
from csdiv.mixture import GaussianMixture
from csdiv.operators import OPERATORS, Operator
from csdiv.reference import Components

MixtureLike = GaussianMixture | torch.distributions.Distribution | torch.nn.Module
"""A mixture, a distribution that ``GaussianMixture.from_distribution`` takes, or a module that returns a mixture."""


def as_mixture(value: Any, name: str) -> GaussianMixture:
    """``value`` as a mixture: a mixture, a torch distribution, or a module that returns a mixture.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, torch.nn.Module):
        value = value()
    if isinstance(value, GaussianMixture):
        return value
    if isinstance(value, torch.distributions.Distribution):
        return GaussianMixture.from_distribution(value)
    raise TypeError(f"{name}: a GaussianMixture or a torch distribution expected, got {type(value).__name__}")


def as_pair(p: Any, q: Any, p_name: str = "p", q_name: str = "q") -> tuple[GaussianMixture, GaussianMixture]:
    """Both sides as mixtures of one dtype, known to fit."""
    p, q = as_mixture(p, p_name), as_mixture(q, q_name)
    dims, devices = (p.means.shape[-1], q.means.shape[-1]), (p.means.device, q.means.device)
    if dims[0] != dims[1]:
        raise ValueError(f"one dimension expected, got D = {dims[0]} in {p_name} and D = {dims[1]} in {q_name}")
    if devices[0] != devices[1]:
        raise ValueError(f"one device expected, got {p_name} on {devices[0]} and {q_name} on {devices[1]}")
    dtype = p.means.dtype
    if computing_dtype(dtype) == dtype and _is_plain(p, dtype) and _is_plain(q, dtype):
        return p, q
    check_batches(p.batch_shape, q.batch_shape, p_name, q_name)
    return one_dtype(p, q)


def _is_plain(p: GaussianMixture, dtype: torch.dtype) -> bool:
    """Whether p is one mixture whose tensors have this dtype."""
    tensors = ((p.means, 2), (p.variances, 2), (p.log_weights, 1), (p.scale_tril, 3), (p.covariance_matrix, 3))
    return all(t is None or (t.dtype == dtype and t.ndim == ndim) for t, ndim in tensors)


def one_dtype(p: GaussianMixture, q: GaussianMixture) -> tuple[GaussianMixture, GaussianMixture]:
    dtype = torch.promote_types(p.dtype, q.dtype)
    return widen(p, dtype), widen(q, dtype)


def check_batches(p_batch: torch.Size, q_batch: torch.Size, p_name: str, q_name: str) -> None:
    if p_batch == q_batch:
        return
    try:
        torch.broadcast_shapes(p_batch, q_batch)
    except RuntimeError:
        raise ValueError(
            f"batch shapes that broadcast expected, got {tuple(p_batch)} in {p_name} and {tuple(q_batch)} in {q_name}"
        ) from None


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def widen(p: GaussianMixture, dtype: torch.dtype | None = None) -> GaussianMixture:
    """p in the dtype that is computed in: all tensors of one, half precision in float32."""
    dtype = computing_dtype(p.dtype if dtype is None else dtype)
    if all(t.dtype == dtype for t in p._tensors()):
        return p
    return p.map(lambda t: t.to(dtype))


REFERENCE, DIAGONAL, WHITENED, FULL = "reference", "diagonal", "whitened", "full"
"""The formulas of a pair: plain differentiable torch; variances; one covariance on each side, in coordinates where
their sum is the identity, equation (18); covariance matrices."""


class Route(NamedTuple):
    """The formula that a pair takes, and the operators in it."""

    formula: str
    p: GaussianMixture
    q: GaussianMixture
    backend: str

    def parts(self, name: str, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value of an operator, float64 if a side is full; what is to be added to it in float64, if anything."""
        value, offset, shift = self._evaluate(name, others)
        return value if shift is None else value - shift, offset

    def value(self, name: str, *others: Tensor) -> Tensor:
        """Both parts together."""
        value, offset, shift = self._evaluate(name, others)
        value = value if offset is None else value + offset
        return value if shift is None else value - shift

    def assign(self) -> Tensor:
        if self.formula == REFERENCE:
            return reference.assign(components(self.p), components(self.q))
        with torch.no_grad():
            operator, tensors, _ = self._operands("assign")
            return ops.ASSIGN[operator.name](*tensors, self.backend)

    def swapped(self) -> Route:
        return self._replace(p=self.q, q=self.p)

    def _evaluate(self, name: str, others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value, the offset, and what is to be subtracted. ``others`` are the tensors of neither side."""
        if others and (self.p.variances is None or self.q.variances is None):
            raise NotImplementedError(f"{name}: diagonal covariances expected")  # others are not whitened
        if self.formula == REFERENCE:
            formula = reference.FORMULAS["log_overlap" if name == "self_overlap" else name]
            return formula(components(self.p), components(self.q), *others), None, None
        operator, tensors, log_det = self._operands(name)
        value, offset = autograd.parts(operator.name, self.backend, *tensors, *others)
        if log_det is not None:
            log_det = log_det.reshape(log_det.shape + (1,) * len(operator.outputs[0].sizes))
        return value, offset, log_det

    def _operands(self, name: str) -> tuple[Operator, list[Tensor | None], Tensor | None]:
        """The operator of the formula, its tensors, and the log determinant of whitening."""
        operator = OPERATORS[f"full_{name}" if self.formula == FULL else name]
        p: Any = self.p
        q: Any = self.q
        log_det = None
        if self.formula == WHITENED:
            p, q, log_det = whitened(p, q)
        elif self.formula == FULL:
            p, q = matrices(p), matrices(q) if operator.q else None
        tensors = [getattr(p, field) for field in operator.p]
        return operator, tensors + [getattr(q, field) for field in operator.q], log_det


def route(p: GaussianMixture, q: GaussianMixture, backend: str) -> Route:
    """Which formula the covariances of a pair take, by structure, sizes, device and ``backend`` alone.

    Raises:
        ValueError: no such backend. NotImplementedError: one asked for by name that has no such covariances.
    """
    if backend != "auto" and not (isinstance(backend, str) and backend in backends.NAMES):
        backends.check_name(backend)
    if backend == "reference":
        return Route(REFERENCE, p, q, backend)
    if p.variances is not None and q.variances is not None:
        return Route(DIAGONAL, p, q, backend)
    dim, limit = p.dim, backends.MAX_FULL_DIM
    if backend != "auto":
        has_any = backends.has_full(backend)
        if not has_any or dim > limit:
            have = f"full covariances up to D = {limit}, got D = {dim}" if has_any else "no full covariances"
            raise NotImplementedError(f'backend "{backend}" has {have}: take backend="auto" or "reference"')
    elif p.device.type not in backends.AUTO or dim > limit:
        return Route(REFERENCE, p, q, backend)
    return Route(WHITENED if _can_be_whitened(p, q) else FULL, p, q, backend)


def cross_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V(p, q), (*batch,), in float64 where the backend has it."""
    way = route(p, q, backend)
    if way.formula != FULL:
        return way.value("log_overlap")
    if has_one_covariance(q):
        way = way.swapped()  # rows of one covariance take one factor for each column
    row_lse, _ = way.parts("overlap_lse")
    log_weights = matrices(way.p).log_weights
    assert log_weights is not None
    return reference.logsumexp(reference.weighted(row_lse, log_weights), -1)


def self_overlap(p: GaussianMixture, backend: str) -> Tensor:
    """log V(p, p), (*batch,), in float64 where the backend has it."""
    return route(p, p, backend).value("self_overlap")


def components(p: GaussianMixture) -> Components:
    covariances = p.covariance_matrix
    if p.scale_tril is not None:
        with torch.autocast(p.device.type, enabled=False):
            covariances = p.scale_tril @ p.scale_tril.mT
    return Components(p.means, p.variances, covariances, p.log_weights)


def matrices(p: GaussianMixture) -> Components:
    """p with covariance matrices and given log weights in float64, as the operators for full covariances take them."""
    wide = components(p.map(torch.Tensor.double))
    return Components(wide.means, None, reference.matrices(wide), reference.log_weights(wide))


def has_one_covariance(p: GaussianMixture) -> bool:
    """Whether all components have the same, as points have."""
    return _spread(p).shape[-3 if p.variances is None else -2] == 1


def _spread(p: GaussianMixture) -> Tensor:
    """The variances, or the matrices, of p."""
    (spread,) = (t for t in (p.variances, p.scale_tril, p.covariance_matrix) if t is not None)
    return spread


def _can_be_whitened(p: GaussianMixture, q: GaussianMixture) -> bool:
    """Not if a side has several covariances, or if a batch of them shares means, which would be copied for each."""
    if not (has_one_covariance(p) and has_one_covariance(q)):
        return False
    items = [_spread(side).shape[: -3 if side.variances is None else -2] for side in (p, q)]
    if not any(items):
        return True
    batch = torch.broadcast_shapes(*items)
    return all(torch.broadcast_shapes(side.means.shape[:-2], batch) == side.means.shape[:-2] for side in (p, q))


def whitened(p: GaussianMixture, q: GaussianMixture) -> tuple[Components, Components, Tensor]:
    """Both sides, each of one covariance, in float64 and in coordinates where S + T = L Lᵀ is the identity.

    Equation (18): means become L⁻¹ (μ − centre), variances ½. The third result is log |L|, (*batch,).
    """
    same, p = p is q, p.map(torch.Tensor.double)
    q = p if same else q.map(torch.Tensor.double)
    total = (reference.matrices(components(p)) + reference.matrices(components(q))).squeeze(-3)
    factor, info = torch.linalg.cholesky_ex(total)
    factor = torch.where((info == 0)[..., None, None], factor, math.nan)
    points = q.means.detach().reshape(-1, q.dim)
    centre = points.sum(0) / max(1, points.shape[0])
    centre = torch.where(centre.isfinite(), centre, 0.0)

    def whiten(side: GaussianMixture) -> Components:
        # A mean that is not finite stays so, and stays out of L's gradient.
        finite = side.means.isfinite().all(-1, keepdim=True)
        centred = torch.where(finite, side.means - centre, 0.0)
        white = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
        means = torch.where(finite, white, side.means)
        return Components(means, means.new_full((1, 1), 0.5), None, reference.log_weights(components(side)))

    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    white = whiten(p)
    return white, white if same else whiten(q), log_det
