"""Two mixtures on their way to an operator: checked, of one dtype, in the form that their covariances ask for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csdiv import autograd, backends, reference
from csdiv.mixture import GaussianMixture

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
    if p.dim != q.dim:
        raise ValueError(f"one dimension expected, got D = {p.dim} in {p_name} and D = {q.dim} in {q_name}")
    if p.device != q.device:
        raise ValueError(f"one device expected, got {p_name} on {p.device} and {q_name} on {q.device}")
    check_batches(p.batch_shape, q.batch_shape, p_name, q_name)
    return one_dtype(p, q)


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


def takes_reference(backend: str, *sides: GaussianMixture) -> bool:
    """Whether plain differentiable torch computes this call: asked for by name, or for a full covariance without it."""
    backends.check_name(backend)
    if backend == "reference" or not has_full(*sides):
        return backend == "reference"
    dim, limit = sides[0].dim, backends.MAX_FULL_DIM
    if backend == "auto":
        return sides[0].device.type not in ("cpu", "cuda") or dim > limit
    has_any = backend in backends.FULL
    if not has_any or dim > limit:
        have = f"full covariances up to D = {limit}, got D = {dim}" if has_any else "no full covariances"
        raise NotImplementedError(f'backend "{backend}" has {have}: take backend="auto" or "reference"')
    return False


def has_full(*sides: GaussianMixture) -> bool:
    return any(side.variances is None for side in sides)


def overlap_rows(p: GaussianMixture, q: GaussianMixture, backend: str) -> tuple[Tensor, Tensor | None]:
    """ℓ_i: value, float64 where a covariance is full, and what is to be added in float64, if anything."""
    if takes_reference(backend, p, q):
        return reference.overlap_lse(components(p), components(q)), None
    if has_full(p, q):
        if white := whitened(p, q):
            value, offset = autograd.overlap_lse(backend, *unweighted(white.p), *weighted(white.q))
            return value - white.log_det.unsqueeze(-1), offset
        return autograd.full_overlap_lse(backend, *matrices(p)[:2], *matrices(q)), None
    return autograd.overlap_lse(backend, *unweighted(p), *weighted(q))


def cross_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V(p, q), (*batch,), in float64 where the backend has it."""
    if takes_reference(backend, p, q):
        return reference.log_overlap(components(p), components(q))
    if has_full(p, q):
        if white := whitened(p, q):
            value, offset = autograd.log_overlap(backend, *weighted(white.p), *weighted(white.q))
            return (value if offset is None else value + offset) - white.log_det
        if _has_one_covariance(q):
            p, q = q, p  # rows of one covariance take one factor for each column
        rows, _ = overlap_rows(p, q, backend)
        return reference.logsumexp(add_log_weights(rows, matrices(p)[2]), -1)
    value, offset = autograd.log_overlap(backend, *weighted(p), *weighted(q))
    return value if offset is None else value + offset


def channel_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V of every pair of channels, (*batch, C, C') float64, in one pass, for log weights (*batch, C, K)."""
    if not has_full(p, q):
        value, offset = autograd.channel_overlap(backend, *unweighted(p), *unweighted(q), p.log_weights, q.log_weights)
        return value if offset is None else value + offset
    *p_matrices, a = matrices(p)
    *q_matrices, b = matrices(q)
    if white := whitened(p, q):
        value, offset = autograd.channel_overlap(backend, *unweighted(white.p), *unweighted(white.q), a, b)
        return (value if offset is None else value + offset) - white.log_det[..., None, None]
    return autograd.full_channel_overlap(backend, *p_matrices, *q_matrices, a, b)


def self_overlap(p: GaussianMixture, backend: str) -> Tensor:
    """log V(p, p), (*batch,), in float64 where the backend has it."""
    if takes_reference(backend, p):
        return reference.log_overlap(components(p), components(p))
    if has_full(p):
        if white := whitened(p, p):
            value, offset = autograd.self_overlap(backend, *weighted(white.p))
            return (value if offset is None else value + offset) - white.log_det
        return autograd.full_self_overlap(backend, *matrices(p))
    value, offset = autograd.self_overlap(backend, *weighted(p))
    return value if offset is None else value + offset


def components(p: GaussianMixture) -> reference.Components:
    covariance = p.covariance_matrix
    if p.scale_tril is not None:
        with torch.autocast(p.device.type, enabled=False):
            covariance = p.scale_tril @ p.scale_tril.mT
    return reference.Components(p.means, p.variances, covariance, p.log_weights)


class Whitened(NamedTuple):
    p: GaussianMixture  # L⁻¹ (μ − centre), variances ½
    q: GaussianMixture
    log_det: Tensor  # (*batch,) log |L|


def whitened(p: GaussianMixture, q: GaussianMixture) -> Whitened | None:
    """p and q, each of one covariance, in float64 and in coordinates where S + T = L Lᵀ is the identity, equation (18).

    None where a side has several covariances, or where a batch of them shares means, which would be copied for each.
    """
    if not (_has_one_covariance(p) and _has_one_covariance(q)):
        return None
    same, p = p is q, p.map(torch.Tensor.double)
    q = p if same else q.map(torch.Tensor.double)
    total = (reference.matrices(components(p)) + reference.matrices(components(q))).squeeze(-3)
    batch = total.shape[:-2]
    if any(torch.broadcast_shapes(side.means.shape[:-2], batch) != side.means.shape[:-2] for side in (p, q)):
        return None
    factor, info = torch.linalg.cholesky_ex(total)
    factor = torch.where((info == 0)[..., None, None], factor, math.nan)
    points = q.means.detach().reshape(-1, q.dim)
    centre = points.sum(0) / max(1, points.shape[0])
    centre = torch.where(centre.isfinite(), centre, 0.0)

    def whiten(side: GaussianMixture) -> GaussianMixture:
        # A mean that is not finite stays so, and stays out of L's gradient.
        finite = side.means.isfinite().all(-1, keepdim=True)
        centred = torch.where(finite, side.means - centre, 0.0)
        white = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
        means = torch.where(finite, white, side.means)
        variances = means.new_full((1, 1), 0.5)
        log_weights = reference.log_weights(components(side))
        return GaussianMixture._unchecked(means=means, variances=variances, log_weights=log_weights)

    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    white = whiten(p)
    return Whitened(white, white if same else whiten(q), log_det)


def _has_one_covariance(p: GaussianMixture) -> bool:
    """Whether all components have the same, as points have."""
    if p.variances is not None:
        return p.variances.shape[-2] == 1
    matrix = p.covariance_matrix if p.scale_tril is None else p.scale_tril
    return matrix is not None and matrix.shape[-3] == 1


def matrices(p: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariance matrices and log weights in float64, as the operators for full covariances take them."""
    wide = components(p.map(torch.Tensor.double))
    return wide.means, reference.matrices(wide), reference.log_weights(wide)


def weighted(p: GaussianMixture) -> tuple[Tensor | None, ...]:
    return p.means, p.variances, p.log_weights


def unweighted(p: GaussianMixture) -> tuple[Tensor | None, ...]:
    return p.means, p.variances


def add_log_weights(value: Tensor, log_weights: Tensor | None) -> Tensor:
    """value + log_weights; a weight of zero gives −inf, whatever the value."""
    if log_weights is None:
        return value
    return torch.where(log_weights == -math.inf, -math.inf, value + log_weights)
