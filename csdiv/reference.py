"""The specification: every quantity in eager torch, differentiated by torch itself.

Any dtype and device; float64 on the CPU is the definition of correct that every backend is held to. Numbers in
parentheses are the equations of docs/math.md. Rows are taken in chunks, and recomputed in the backward pass, so that
memory stays bounded by ``CHUNK_ELEMENTS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csdiv.shapes import broadcast
from csdiv.transforms import forward_level, full_like_device, has_values, transforms_active

CHUNK_ELEMENTS = 2**22
"""Numbers in the largest temporary of one chunk of rows."""

LOG_2PI = math.log(2.0 * math.pi)
_LOG_4PI = math.log(4.0 * math.pi)
LOG_VARIANCE_CAPS = {torch.float32: 85.0, torch.float64: 700.0}
"""Log variances that are exponentiated at most."""


class Components(NamedTuple):
    """One side of a pair; one of ``variances``, ``covariances`` and ``factors`` is given, or none: points against
    factors."""

    means: Tensor  # (*batch, K, D)
    variances: Tensor | None = None  # (*batch, K or 1, D or 1)
    covariances: Tensor | None = None  # (*batch, K or 1, D, D)
    log_weights: Tensor | None = None  # (*batch, K), None: uniform
    factors: Tensor | None = None  # (*batch, K or 1, D, D) lower triangular, of the sum of both sides' covariances
    log_variances: Tensor | None = None  # (*batch, K, D) in place of variances


def pairwise_log_overlap(p: Components, q: Components) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j), shape (*batch, N, M); equations (4), (7) and (17)."""
    if q.factors is not None:
        return _log_normal_factored(p.means, q.means, q.factors)
    delta = p.means.unsqueeze(-2) - q.means.unsqueeze(-3)  # (*batch, N, M, D)
    if p.variances is not None and q.variances is not None:
        s, t = nan_if_negative(p.variances), nan_if_negative(q.variances)
        return _log_normal_diagonal(delta, s.unsqueeze(-2) + t.unsqueeze(-3))
    return _log_normal_full(delta, matrices(p).unsqueeze(-3) + matrices(q).unsqueeze(-4))


def overlap_lse(p: Components, q: Components) -> Tensor:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j), shape (*batch, N); equation (3). p's weights are not used."""
    q = neutralise(q)
    log_b = log_weights(q).unsqueeze(-2)
    return _by_rows(lambda rows: logsumexp(weighted(pairwise_log_overlap(rows, q), log_b), -1), p, q)


def log_overlap(p: Components, q: Components) -> Tensor:
    """log V(p, q), shape (*batch,); equations (1) and (3)."""
    p = neutralise(p)
    return logsumexp(overlap_lse(p, q) + log_weights(p), -1)


def cs_divergence(p: Components, q: Components) -> Tensor:
    """D_CS(p, q) = −log V(p, q) + ½ log V(p, p) + ½ log V(q, q), shape (*batch,); equation (2)."""
    # Not times 0.5: torch gives that number times a scalar under jacfwd a float64 derivative.
    return torch.stack(torch.broadcast_tensors(log_overlap(p, p), log_overlap(q, q))).mean(0) - log_overlap(p, q)


def component_divergence(p: Components, q: Components, q_self_overlap: Tensor | None = None) -> Tensor:
    """D_CS(N(μ_i, S_i), q) of each component of p, shape (*batch, N); equation (20). p's weights are not used.

    ``q_self_overlap``, (*batch,), is log V(q, q), float64, if that is known.
    """
    dtype = p.means.dtype
    p, q, own = with_own_terms(p, q)
    rows = overlap_lse(p, q)
    known = log_overlap(q, q) if q_self_overlap is None else q_self_overlap
    return (own_part(own, known, p.means.shape[-1]) - rows).to(dtype)


def own_part(own: Tensor, self_overlap: Tensor, dim: int) -> Tensor:
    """Equation (20) but for −ℓ_i, (*batch, N) float64, of own terms (*batch, N) and log V(q, q) (*batch,)."""
    return own + (0.5 * self_overlap.double().unsqueeze(-1) - 0.25 * dim * _LOG_4PI)


def with_own_terms(p: Components, q: Components) -> tuple[Components, Components, Tensor]:
    """p with variances, q in the same dtype, and −¼ Σ log s of each component of p, float64.

    Above a cap s + t is s to rounding: exp(cap) stands in for s in ℓ_i, and what −ℓ_i lacks, ½ Σ (log s − cap), comes
    to the own terms, equation (10).
    """
    if p.log_variances is None:
        assert p.variances is not None
        variances = nan_if_negative(p.variances).expand(p.means.shape)
        point = (variances == 0.0).any(-1)
        own = -0.25 * torch.where(point.unsqueeze(-1), 1.0, variances).double().log().sum(-1)
        return p, q, torch.where(point, math.inf, own)
    if p.log_variances.dtype == torch.float32 and _are_extreme(p.log_variances):
        p, q = (Components._make(None if t is None else t.double() for t in side) for side in (p, q))
    assert p.log_variances is not None
    cap, logs = LOG_VARIANCE_CAPS[p.log_variances.dtype], p.log_variances.double()
    own = torch.where(logs > cap, 0.25 * logs - 0.5 * cap, -0.25 * logs).sum(-1)
    return p._replace(variances=p.log_variances.clamp(max=cap).exp(), log_variances=None), q, own


def _are_extreme(log_variances: Tensor) -> bool:
    """Whether float32 gradients may leave their range where those to log s do not; known on CPUs alone."""
    if log_variances.device.type != "cpu" or not has_values(log_variances) or log_variances.numel() == 0:
        return False
    least, largest = (t.item() for t in torch.aminmax(log_variances.detach()))
    return not (least >= -20.0 and largest <= 60.0)


def channel_overlap(p: Components, q: Components) -> Tensor:
    """log V of the channels of p and q, (*batch, C, C'), for log weights (*batch, C, N) and (*batch, C', M)."""
    p, q, a = _for_channels(p), _for_channels(q), log_weights(p)
    absent = a.amax(-2, keepdim=True)  # −inf for components without weight in any channel
    return channel_lse(a, overlap_lse(neutralise(p._replace(log_weights=absent)), q))


def _for_channels(p: Components) -> Components:
    """The channels of p as a batch of mixtures."""
    covariances, factors = (None if t is None else t.unsqueeze(-4) for t in (p.covariances, p.factors))
    variances = None if p.variances is None else p.variances.unsqueeze(-3)
    return Components(p.means.unsqueeze(-3), variances, covariances, p.log_weights, factors)


def channel_lse(channels: Tensor, row_lse: Tensor) -> Tensor:
    """LSE_i(log a_ci + ℓ_c'i), (*batch, C, C'), for weights (*batch, C, N) and ℓ (*batch, C', N); equation (16)."""
    channels = torch.where(channels == math.inf, math.nan, channels).unsqueeze(-2)  # (*batch, C, 1, N)

    def overlaps(channels: Tensor, row_lse: Tensor) -> Tensor:
        return logsumexp(weighted(row_lse.unsqueeze(-3), channels), -1)

    batch = broadcast(channels.shape[:-3], row_lse.shape[:-2])
    count = max(1, CHUNK_ELEMENTS // max(1, math.prod(batch) * channels.shape[-3] * channels.shape[-1]))
    if count >= row_lse.shape[-2]:
        return overlaps(channels, row_lse)
    return torch.cat([_recomputed(overlaps, channels, chunk) for chunk in row_lse.split(count, -2)], -1)


def assign(p: Components, q: Components) -> Tensor:
    """argmax_j of log b_j + log N(μ_i; ν_j, S_i + T_j), shape (*batch, N), int64."""
    q = neutralise(q)
    log_b = log_weights(q).unsqueeze(-2)
    return _by_rows(lambda rows: (pairwise_log_overlap(rows, q) + log_b).argmax(-1), p, q)


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` whose gradient is zero, not NaN, where the sum is infinite or every term is −inf."""
    largest = x.detach().amax(dim, keepdim=True)
    terms = torch.where(largest.isinf(), 0.0, x - largest)
    return terms.exp().sum(dim).log() + largest.squeeze(dim)


def weighted(value: Tensor, log_weights: Tensor) -> Tensor:
    """value + log_weights; a weight of zero counts nothing, whatever the value: −inf."""
    return torch.where(log_weights == -math.inf, -math.inf, value + log_weights)


def log_weights(p: Components) -> Tensor:
    """The log weights of p, −log K each if none were given, NaN for +inf; shape (*batch, K)."""
    if p.log_weights is not None:
        return torch.where(p.log_weights == math.inf, math.nan, p.log_weights)
    return full_like_device(p.means, p.means.shape[-2:-1], -math.log(max(1, p.means.shape[-2])))


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "overlap_lse": overlap_lse,
    "log_overlap": log_overlap,
    "self_overlap": lambda p: log_overlap(p, p),
    "cs_divergence": cs_divergence,
    "regularizer": component_divergence,
    "component_divergence": component_divergence,
    "pairwise": pairwise_log_overlap,
    "channel_overlap": channel_overlap,
    "channel_self_overlap": lambda p: channel_overlap(p, p),
    "assign": assign,
}
"""The value of each operator, see :mod:`csdiv.operators`, from p, q and the tensors of neither."""

ROW_LSE: dict[str, Callable[..., Tensor]] = {
    "regularizer": lambda p, q, _: overlap_lse(*with_own_terms(p, q)[:2]),
    "component_divergence": lambda p, q, _: overlap_lse(p, q),
}
"""The output "row_lse" of operators whose is not :func:`overlap_lse`, from the same."""


def _log_normal_diagonal(delta: Tensor, c: Tensor) -> Tensor:
    """Equation (4). ``delta`` (*batch, N, M, D), ``c`` broadcastable to it; zero and overflow go to their limits."""
    c = c.expand(broadcast(c.shape, delta.shape))
    z = delta.detach() / c.detach().sqrt()
    far = ((z * z).isinf() | (c.isinf() & ~delta.isnan())) & (
        c >= 0
    )  # the exponent is −inf: cut, so that no gradient is 0 · inf
    same = (c == 0) & (delta == 0)  # two points at one place: +inf, unless another dimension is far
    c = torch.where(far | same, 1.0, c)
    z = torch.where(far | same, 0.0, delta) / c.sqrt()
    value = -0.5 * (z * z + c.log() + LOG_2PI).sum(-1)
    value = torch.where(same.any(-1) & ~value.isnan(), math.inf, value)
    return torch.where(far.any(-1) & ~value.isnan(), -math.inf, value)


def _log_normal_full(delta: Tensor, c: Tensor) -> Tensor:
    """Equation (7). ``delta`` (*batch, N, M, D), ``c`` (*batch, N or 1, M or 1, D, D); NaN if not positive definite."""
    factor, info = torch.linalg.cholesky_ex(c)
    delta = delta.expand(*broadcast(delta.shape[:-1], c.shape[:-2]), delta.shape[-1])
    factor = factor.expand(*delta.shape, delta.shape[-1])
    z = torch.linalg.solve_triangular(factor, delta.unsqueeze(-1), upper=False).squeeze(-1)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = -0.5 * ((z * z).sum(-1) + log_det + delta.shape[-1] * LOG_2PI)
    return torch.where(info == 0, value, math.nan)


def _log_normal_factored(x: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """Equation (17): (*batch, N, M) for points (*batch, N, D), each factor solved for all of them at once."""
    delta = x.unsqueeze(-3) - means.unsqueeze(-2)  # (*batch, M, N, D)
    if factors.shape[-3] == 1:
        z = torch.linalg.solve_triangular(factors.squeeze(-3), delta.flatten(-3, -2).mT, upper=False)
        squares = z.square().sum(-2).unflatten(-1, delta.shape[-3:-1])
    else:
        squares = torch.linalg.solve_triangular(factors, delta.mT, upper=False).square().sum(-2)
    log_det = factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1, keepdim=True)
    return (-0.5 * (squares + x.shape[-1] * LOG_2PI) - log_det).mT


def nan_if_negative(variances: Tensor) -> Tensor:
    """So that adding something positive does not hide the sign."""
    return torch.where(variances < 0, math.nan, variances)


def matrices(p: Components) -> Tensor:
    """The covariances of p as matrices, (*batch, K or 1, D, D)."""
    if p.covariances is not None:
        return p.covariances
    assert p.variances is not None
    variances = nan_if_negative(p.variances)
    return torch.diag_embed(variances.expand(*variances.shape[:-1], p.means.shape[-1]))


def neutralise(p: Components) -> Components:
    """Gives components of weight zero parameters that cannot spoil a sum: N(0, I)."""
    if p.log_weights is None:
        return p
    absent = (p.log_weights == -math.inf).unsqueeze(-1)
    variances, covariances, factors = p.variances, p.covariances, p.factors
    if variances is not None:
        variances = torch.where(absent, 1.0, variances)
    if covariances is not None:
        covariances = torch.where(absent.unsqueeze(-1), _eye_like(covariances), covariances)
    if factors is not None:
        factors = torch.where(absent.unsqueeze(-1), _eye_like(factors), factors)
    means = torch.where(absent, 0.0, p.means)
    return p._replace(means=means, variances=variances, covariances=covariances, factors=factors)


def _eye_like(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def somewhere(mask: Tensor, shape: torch.Size) -> Tensor:
    """Whether ``mask`` holds anywhere in what ``shape`` leaves out of the batch."""
    if mask.shape == shape:
        return mask
    return mask.expand(broadcast(mask.shape, shape)).double().sum_to_size(shape) > 0.0


def _by_rows(function: Callable[[Components], Tensor], p: Components, q: Components) -> Tensor:
    """``function`` applied to chunks of p's components, joined along them."""
    n, dim = p.means.shape[-2:]
    batch = broadcast(p.means.shape[:-2], q.means.shape[:-2])
    per_row = math.prod(batch) * q.means.shape[-2] * dim
    if p.covariances is not None or q.covariances is not None:
        per_row *= dim
    rows = max(1, CHUNK_ELEMENTS // max(1, per_row))
    if rows >= n:
        return function(p)
    pieces = []
    for start in range(0, n, rows):
        chunk = Components._make(
            _slice(t, start, rows, axis) for t, axis in zip(p, (-2, -2, -3, -1, -3, -2), strict=True)
        )
        pieces.append(_recomputed(lambda *c: function(Components(*c)), *chunk))
    return torch.cat(pieces, -1)


def _slice(t: Tensor | None, start: int, length: int, axis: int) -> Tensor | None:
    """Rows start … start + length of ``t`` along its component axis; a tied parameter has one and stays whole."""
    if t is None or t.shape[axis] == 1:
        return t
    return t.narrow(axis, start, min(length, t.shape[axis] - start))


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``function(*tensors)`` that keeps no intermediates for the backward pass, where torch allows it."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or transforms_active() or forward_level() >= 0:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
