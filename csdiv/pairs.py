"""Two mixtures on their way to an operator: checked, of one dtype, and the formula that their covariances take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csdiv import autograd, backends, conversions, reference, weights
from csdiv.backends.reference import formula
from csdiv.checks import HALF, computing_dtype, type_name
from csdiv.covariances import (
    can_be_whitened,
    factored,
    has_factor,
    has_one_covariance,
    is_points,
    log_weights,
    matrices,
    shares_no_means,
    whitened,
    without_absent,
)
from csdiv.mixture import MATRICES, GaussianMixture
from csdiv.operators import OPERATORS, Operator
from csdiv.reference import Components
from csdiv.shapes import broadcast

MixtureLike = GaussianMixture | torch.distributions.Distribution | torch.nn.Module
"""A mixture; what ``GaussianMixture.from_distribution``, ``from_sklearn`` or ``from_scipy`` takes, the last two without
types here, as their libraries may be absent; or a module that returns one of them."""


def as_mixture(value: Any, name: str) -> GaussianMixture:
    """``value`` as a mixture, see :data:`MixtureLike`.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, torch.nn.Module):
        value = value()
    if isinstance(value, GaussianMixture):
        return value
    if isinstance(value, torch.distributions.Distribution):
        return GaussianMixture.from_distribution(value)
    if conversions.is_sklearn(value):
        return GaussianMixture.from_sklearn(value)
    if conversions.is_scipy(value):
        return GaussianMixture.from_scipy(value)
    expected = "a csdiv.GaussianMixture, a module that returns one, or a mixture of torch, scikit-learn or SciPy"
    raise TypeError(f"{name}: {expected} expected, got {type_name(value)}")


def as_pair(p: Any, q: Any, p_name: str = "p", q_name: str = "q") -> tuple[GaussianMixture, GaussianMixture]:
    """Both sides as mixtures of one dtype, known to fit."""
    p, q = as_mixture(p, p_name), as_mixture(q, q_name)
    check_fit(p.means, q, p_name, q_name)
    dtype = p.means.dtype
    if is_plain(p, dtype) and is_plain(q, dtype):
        return p, q
    check_batches(p.batch_shape, q.batch_shape, p_name, q_name)
    return one_dtype(p, q)


def check_fit(means: Tensor, q: GaussianMixture, p_name: str, q_name: str) -> None:
    """Raises ValueError unless these means and q's have one dimension and device."""
    other = q.means
    if (dim := means.shape[-1]) != other.shape[-1]:
        raise ValueError(f"one dimension expected, got D = {dim} in {p_name} and D = {other.shape[-1]} in {q_name}")
    if means.device != other.device:
        raise ValueError(f"one device expected, got {p_name} on {means.device} and {q_name} on {other.device}")


def is_plain(p: GaussianMixture, dtype: torch.dtype) -> bool:
    """Whether p is one mixture with variances whose tensors have this dtype, in which it is computed."""
    means, variances, log_weights = p.means, p.variances, p.log_weights
    if variances is None or dtype in HALF or means.dtype != dtype or variances.dtype != dtype:
        return False
    if log_weights is not None and (log_weights.dtype != dtype or log_weights.ndim != 1):
        return False
    return means.ndim == 2 == variances.ndim


def one_dtype(p: GaussianMixture, q: GaussianMixture) -> tuple[GaussianMixture, GaussianMixture]:
    dtype = torch.promote_types(p.dtype, q.dtype)
    return widen(p, dtype), widen(q, dtype)


def check_batches(p_batch: torch.Size, q_batch: torch.Size, p_name: str, q_name: str) -> None:
    if p_batch == q_batch:
        return
    try:
        broadcast(p_batch, q_batch)
    except RuntimeError:
        raise ValueError(
            f"batch shapes that broadcast expected, got {tuple(p_batch)} in {p_name} and {tuple(q_batch)} in {q_name}"
        ) from None


def widen(p: GaussianMixture, dtype: torch.dtype | None = None) -> GaussianMixture:
    """p in the dtype that is computed in: all tensors of one, half precision in float32."""
    dtype = computing_dtype(p.dtype if dtype is None else dtype)
    if all(t.dtype == dtype for t in p._tensors()):
        return p
    return p.map(lambda t: t.to(dtype))


DIAGONAL, WHITENED, FACTORED, FULL = "diagonal", "whitened", "factored", "full"
"""The formulas of a pair: variances; one covariance on each side, in coordinates where their sum is the identity,
equation (18); one covariance on one side, whose sum with each of the other's is factored once, equation (17);
covariance matrices."""
_PREFIXES = {FACTORED: "factored_", FULL: "full_"}
_FROM_ROWS = {FACTORED: ("log_overlap", "self_overlap"), FULL: ("log_overlap",)}


class Route(NamedTuple):
    """The formula that a pair takes, and the operators in it; all but DIAGONAL in float64."""

    formula: str
    p: GaussianMixture
    q: GaussianMixture
    backend: str
    eager: bool  # whether plain differentiable torch computes it, by csdiv.reference
    transposed: bool = False  # whether q has the rows: where it is the side of one covariance

    def parts(self, name: str, *others: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value of an operator, float64 if a side is full; what is to be added to it in float64, if anything."""
        value, offset, shift = self._evaluate(name, others)
        return _shifted(value, shift), offset

    def value(self, name: str, *others: Tensor) -> Tensor:
        """Both parts together."""
        value, offset, shift = self._evaluate(name, others)
        return _shifted(value if offset is None else value + offset, shift)

    def assign(self) -> Tensor:
        if self.transposed:
            return self._of_pairs().argmax(-1)
        if (operands := self._operands("assign")) is None:
            return self._by_component().assign()
        p, q, _ = operands
        if self.eager:
            return reference.assign(p, q)
        operator = self._operator("assign")
        with torch.no_grad():
            return autograd.assign(operator.name, self.backend, *_tensors(operator, p, q))

    def swapped(self) -> Route:
        return self._replace(p=self.q, q=self.p, transposed=False)

    def _by_component(self) -> Route:
        return _by_component(self.p, self.q, self.backend, self.eager)

    def _evaluate(self, name: str, others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The value, the offset, and what is to be subtracted. ``others`` are the tensors of neither side."""
        if self.formula == DIAGONAL and not self.eager:
            value, offset = autograd.parts(name, self.backend, *_tensors(OPERATORS[name], self.p, self.q), *others)
            return value, offset, None
        if others and self.formula != DIAGONAL:
            raise NotImplementedError(f"{name}: diagonal covariances expected")  # others are not whitened
        if name in _FROM_ROWS.get(self.formula, ()) and not self.eager:
            return self._log_overlap(), None, None
        if self.transposed:
            if name == "overlap_lse":
                return reference.logsumexp(self._of_pairs(), -1), None, None
            value = self.swapped().value(name)
            return value.mT if OPERATORS[name].outputs[0].sizes else value, None, None
        if self.formula == FACTORED and OPERATORS[name].channels:
            if not self.eager:
                return self._replace(formula=FULL)._evaluate(name, others)
            name = "channel_overlap"  # q alone has the factors
        if (operands := self._operands(name)) is None:
            return self._by_component()._evaluate(name, others)
        p, q, log_det = operands
        if log_det is not None:
            log_det = log_det.reshape(log_det.shape + (1,) * len(OPERATORS[name].outputs[0].sizes))
        if self.eager:
            if name in _FROM_ROWS.get(self.formula, ()):
                name = "log_overlap"
            sides = (p, q) if OPERATORS[name].q else (p,)
            return reference.FORMULAS[name](*sides, *others), None, log_det
        operator = self._operator(name)
        value, offset = autograd.parts(operator.name, self.backend, *_tensors(operator, p, q), *others)
        return value, offset, log_det

    def _log_overlap(self) -> Tensor:
        """log V from its rows, those of the side of one covariance, if there is one."""
        way = self.swapped() if has_one_covariance(self.q) else self
        row_lse, _ = way.parts("overlap_lse")
        return reference.logsumexp(reference.weighted(row_lse, _log_weights(way.p, row_lse)), -1)

    def _of_pairs(self) -> Tensor:
        """log b_j + log N(μ_i; ν_j, S_i + T_j), (*batch, N, M), where q has the rows."""
        pairwise = self.swapped().value("pairwise").mT
        return reference.weighted(pairwise, _log_weights(self.q, pairwise).unsqueeze(-2))

    def _operands(self, name: str) -> tuple[Components, Components, Tensor | None] | None:
        """Both sides, and the log determinant of whitening; None where components are too far apart for it."""
        if self.formula == DIAGONAL:
            p, q = (Components(side.means, side.variances, None, side.log_weights) for side in (self.p, self.q))
            return p, q, None
        operator = OPERATORS[name]
        wide_p = self.p.map(torch.Tensor.double)
        wide_q = wide_p if self.q is self.p else self.q.map(torch.Tensor.double)
        given = wide_p.log_weights, wide_q.log_weights
        if operator.channels:  # what has no weight in any channel counts nothing
            wide_p, wide_q = (_with_strongest_channel(side) for side in (wide_p, wide_q))
        if "log_weights" in (operator.q or operator.p):
            same = wide_p is wide_q
            wide_q = without_absent(wide_q)
            if "log_weights" in operator.p:
                wide_p = wide_q if same else without_absent(wide_p)
        found = self._in_formula(wide_p, wide_q)
        if found is None or not operator.channels:
            return found
        p, q, log_det = found
        return p._replace(log_weights=given[0]), q._replace(log_weights=given[1]), log_det

    def _in_formula(
        self, p: GaussianMixture, q: GaussianMixture
    ) -> tuple[Components, Components, Tensor | None] | None:
        if self.formula == WHITENED:
            return whitened(p, q)
        if self.formula == FACTORED:
            return *factored(p, q), None
        full = matrices(p)
        return full, full if p is q else matrices(q), None

    def _operator(self, name: str) -> Operator:
        return OPERATORS[_PREFIXES.get(self.formula, "") + name]


def _with_strongest_channel(p: GaussianMixture) -> GaussianMixture:
    """p, whose log weights are those of channels, with the largest of each component."""
    assert p.log_weights is not None
    log_weights = p.log_weights.amax(-2)
    spreads = {name: getattr(p, name) for name in ("variances", *MATRICES)}
    return p._unchecked(means=p.means, log_weights=log_weights, **spreads)


def _shifted(value: Tensor, shift: Tensor | None) -> Tensor:
    """Their difference, without a gradient to the shift where the value is −inf."""
    return value if shift is None else torch.where(value == -math.inf, -math.inf, value - shift)


def _log_weights(p: GaussianMixture, like: Tensor) -> Tensor:
    return log_weights(p.map(lambda t: t.to(like.dtype)))


def _tensors(operator: Operator, p: Any, q: Any) -> list[Tensor | None]:
    return [getattr(p, field) for field in operator.p] + [getattr(q, field) for field in operator.q]


def route(p: GaussianMixture, q: GaussianMixture, backend: str) -> Route:
    """Which formula the covariances of a pair take, by structure, sizes, device and ``backend`` alone.

    Raises:
        ValueError: no such backend. NotImplementedError: one asked for by name that has no such covariances.
    """
    eager = _is_eager(backend, p.means.device)
    if p.variances is not None and q.variances is not None:
        return Route(DIAGONAL, p, q, backend, eager)
    if can_be_whitened(p, q):
        return Route(WHITENED, p, q, backend, eager)
    return _by_component(p, q, backend, eager)


def _is_eager(backend: str, device: torch.device) -> bool:
    """Whether plain differentiable torch computes what is diagonal. Raises ValueError: no such backend."""
    if backend == "auto":
        return device.type not in backends.AUTO
    if not (isinstance(backend, str) and backend in backends.NAMES):
        backends.check_name(backend)
    return backend == "reference"


def component_divergence(name: str, backend: str, *tensors: Tensor | None) -> Tensor:
    """D_CS of components from a mixture, (*batch, N): "regularizer" or "component_divergence" of tensors in its order.

    All are of one dtype, but for log V(q, q), float64.
    """
    means = tensors[0]
    assert means is not None
    if _is_eager(backend, means.device):
        return formula(name, tensors)
    return autograd.parts(name, backend, *tensors)[0]


def _by_component(p: GaussianMixture, q: GaussianMixture, backend: str, eager: bool) -> Route:
    """The formula where a side has several covariances, or components too far apart for whitening."""
    dim, limit = p.dim, backends.MAX_FULL_DIM
    if backend not in ("auto", "reference"):
        has_any = backends.has_full(backend)
        if not has_any or dim > limit:
            have = f"full covariances up to D = {limit}, got D = {dim}" if has_any else "no full covariances"
            raise NotImplementedError(f'backend "{backend}" has {have}: take backend="auto" or "reference"')
    one_of_p, one_of_q = has_one_covariance(p), has_one_covariance(q)
    if eager or dim > limit:
        transposed = one_of_q and not one_of_p
        return Route(FACTORED if one_of_p or one_of_q else FULL, p, q, backend, True, transposed)
    of_one = one_of_p and one_of_q and (has_factor(p) or has_factor(q)) and shares_no_means(p, q, q)
    given = of_one or (is_points(p) and has_factor(q))
    native = given and backends.has_factors(backend, p.device)
    return Route(FACTORED if native else FULL, p, q, backend, False)


def cross_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V(p, q), (*batch,), in float64 where the backend has it."""
    value = route(p, q, backend).value("log_overlap")
    for side, other in ((p, q), (q, p)):
        value = with_derivatives_at_zero(value, side, other, backend)
    return value


def self_overlap(p: GaussianMixture, backend: str) -> Tensor:
    """log V(p, p), (*batch,), in float64 where the backend has it."""
    return with_derivatives_at_zero(route(p, p, backend).value("self_overlap"), p, p, backend, 2.0)


def row_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> tuple[Tensor, Tensor | None]:
    """The log overlap of each component of p with q, (*batch, N): the value, and what is to be added in float64."""
    row_lse, offset = route(p, q, backend).parts("overlap_lse")
    if q.weights is not None:
        total = row_lse if offset is None else row_lse + offset
        rows = p.detach()
        missing = weights.correction(q, total, lambda absent: route(rows, absent, backend).value("overlap_lse"))
        row_lse = row_lse if missing is None else row_lse + missing.to(row_lse.dtype)
    return row_lse, offset


def with_derivatives_at_zero(
    value: Tensor, p: GaussianMixture, q: GaussianMixture, backend: str, factor: float = 1.0, of: Tensor | None = None
) -> Tensor:
    """``value``, with the gradient of ``factor`` · log V(p, q) to those linear weights of p that are zero.

    ``of`` is log V(p, q), by default ``value``.
    """
    if p.weights is None:
        return value
    q = q.detach()
    log_v = value if of is None else of
    missing = weights.correction(p, log_v, lambda absent: route(absent, q, backend).value("log_overlap"))
    return value if missing is None else value + (factor * missing).to(value.dtype)
