"""Distances, similarities and entropies that follow from overlaps; conventions are those of :mod:`csdiv.functional`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csdiv import pairs, reference
from csdiv.checks import as_bandwidth
from csdiv.covariances import components
from csdiv.functional import cs_divergence, known_self_overlap, log_overlap
from csdiv.mixture import GaussianMixture
from csdiv.pairs import MixtureLike

_LOG_4PI = math.log(4.0 * math.pi)


def renyi2_entropy(p: MixtureLike, *, backend: str = "auto") -> Tensor:
    """Rényi entropy of order 2, H₂(p) = −log ∫ p(x)² dx, (*batch,) nats. Raises: as :func:`cs_divergence`."""
    return -log_overlap(p, backend=backend)


def cosine_similarity(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """cos∠(p, q) = V(p, q) / √(V(p, p) V(q, q)) = exp(−D_CS(p, q)), the Carbó similarity, (*batch,) in [0, 1].

    It does not change with the scale of either side's weights; above 1 by rounding only. Errors, gradients, memory and
    Raises: as :func:`cs_divergence`.
    """
    return cs_divergence(p, q, backend=backend).neg().exp()


def ise(
    p: MixtureLike,
    q: MixtureLike,
    *,
    log: bool = False,
    p_self_overlap: Tensor | None = None,
    q_self_overlap: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Integrated squared error ∫ (p − q)² = V(p, p) − 2 V(p, q) + V(q, q), equation (12).

    Weights are used as given: for two intensities of Poisson processes, half of it is their Cauchy–Schwarz divergence.

    The three overlaps are combined in float64 relative to the larger self term. For p ≈ q in float32 on the CPU
    |error| ≤ V · 4e-6 · max(1, D / 64), V ≈ V(p, p) ≈ V(q, q), to first order in p − q, equation (13). For differences
    below that, give mixtures in float64.

    Args:
        p, q: mixtures; batch shapes broadcast. A side without any weight is the zero function.
        log: whether to return log ISE, which stays finite where ISE leaves the dtype's range.
        p_self_overlap, q_self_overlap: known self terms, see :func:`cs_divergence`.
        backend: see the module.

    Returns:
        (*batch,) ≥ 0 up to rounding, in units of 1 / volume; with ``log`` in nats, −inf where no difference is left
        (at p = q: −inf, or as much below log V as rounding allows).

    Gradients: to every parameter, zero up to rounding at p = q; with ``log`` zero where the value is −inf.
    Memory O((N + M) D). Raises: as :func:`cs_divergence`.

    Source: Williams, Maybeck, "Cost-function-based Gaussian mixture reduction for target tracking", FUSION 2003; Hoang,
    Vo, Vo, Mahler, "The Cauchy–Schwarz divergence for Poisson point processes", IEEE Trans. Inf. Theory 61, 2015.
    """
    p, q = pairs.as_pair(p, q)
    scale, pq, pp, qq = _scaled_overlaps(p, q, backend, (p_self_overlap, q_self_overlap))
    return _unscaled(scale, (pp - pq) + (qq - pq), log).to(p.dtype)


def nise(
    p: MixtureLike,
    q: MixtureLike,
    *,
    p_self_overlap: Tensor | None = None,
    q_self_overlap: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Normalised integrated squared error ∫ (p − q)² / (∫ p² + ∫ q²) = 1 − 2 V(p, q) / (V(p, p) + V(q, q)).

    ``p_self_overlap`` and ``q_self_overlap`` are known self terms, see :func:`cs_divergence`.

    Returns:
        (*batch,) in [0, 1] up to rounding: 0 iff p = q, 1 iff nothing overlaps; NaN where neither side has any weight.
        For p ≈ q in float32 on the CPU |error| ≤ 2e-6 · max(1, D / 64), see :func:`ise`.

    Gradients: to every parameter. Memory O((N + M) D). Raises: as :func:`cs_divergence`. Source: equation (14).
    """
    p, q = pairs.as_pair(p, q)
    _, pq, pp, qq = _scaled_overlaps(p, q, backend, (p_self_overlap, q_self_overlap))
    return (((pp - pq) + (qq - pq)) / (pp + qq)).to(p.dtype)


def mmd2(
    p: MixtureLike, q: MixtureLike, bandwidth: float | Tensor, *, log: bool = False, backend: str = "auto"
) -> Tensor:
    """Squared maximum mean discrepancy of the kernel k(x, y) = exp(−|x − y|² / 2g²), g the bandwidth.

    MMD² = (2πg²)^{D/2} (V_g(p, p) − 2 V_g(p, q) + V_g(q, q)), with g² added to the variance of every pair, equation
    (15). Points may have variance zero: then it is the biased estimate from two samples.

    Args:
        p, q: mixtures; batch shapes broadcast. Weights are used as given.
        bandwidth: g > 0, a number or a tensor that broadcasts with (*batch,): several kernels are a batch.
        log: whether to return log MMD².
        backend: see the module.

    Returns:
        (*batch,), within [0, 2] up to rounding for normalised weights; with ``log`` in nats, −inf where no difference
        is left. Errors as of :func:`ise`, relative to (2πg²)^{D/2} V_g(p, p) ≤ 1.

    Gradients: to every parameter and to the bandwidth, zero up to rounding at p = q. Memory O((N + M) D). Raises: as
    :func:`cs_divergence`; ValueError for a number g ≤ 0 (in a tensor it gives NaN).

    Source: Gretton et al., "A kernel two-sample test", JMLR 13, 2012.
    """
    p, q = pairs.as_pair(p, q)
    bandwidth = as_bandwidth(bandwidth, p.means).to(p.dtype)
    if bandwidth.device != p.device:
        raise ValueError(f"one device expected, got p on {p.device} and bandwidth on {bandwidth.device}")
    for side, name in ((p, "p"), (q, "q")):
        pairs.check_batches(side.batch_shape, bandwidth.shape, name, "bandwidth")
    half_squared = 0.5 * torch.where(bandwidth > 0.0, bandwidth, math.nan).square()
    scale, pq, pp, qq = _scaled_overlaps(_convolved(p, half_squared), _convolved(q, half_squared), backend)
    log_factor = 0.5 * p.dim * (half_squared.double().log() + _LOG_4PI)
    return _unscaled(scale + log_factor, (pp - pq) + (qq - pq), log).to(p.dtype)


def _scaled_overlaps(
    p: GaussianMixture, q: GaussianMixture, backend: str, known: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The larger log self overlap, and V(p, q), V(p, p) and V(q, q) divided by its exponential; float64.

    Relative to an infinite self overlap, what is finite is 0 and infinite self overlaps are 1.
    """
    pq = pairs.cross_overlap(p, q, backend).double()
    pp, qq = (
        known_self_overlap(given, side, name, backend)
        for given, side, name in zip(known, (p, q), ("p", "q"), strict=True)
    )
    scale = torch.maximum(pp, qq).detach()  # the result does not depend on it, and has no gradient through it
    scale = torch.where(scale == -math.inf, 0.0, scale)
    infinite = scale == math.inf
    pp, qq = (torch.where(infinite, torch.where(t == math.inf, 0.0, -math.inf), t - scale) for t in (pp, qq))
    pq = torch.where(infinite, torch.where(pq < math.inf, -math.inf, math.nan), pq - scale)
    return scale, pq.exp(), pp.exp(), qq.exp()


def _unscaled(scale: Tensor, value: Tensor, log: bool) -> Tensor:
    """exp(scale) · value, or its logarithm, −inf with zero gradients where the value is not positive."""
    if not log:
        return scale.exp() * value
    nothing = value <= 0.0
    return torch.where(nothing, -math.inf, torch.where(nothing, 1.0, value).log() + scale)


def _convolved(p: GaussianMixture, variance: Tensor) -> GaussianMixture:
    """p with ``variance`` (*batch,) added to every component."""
    if p.variances is not None:
        variances = reference.nan_if_negative(p.variances) + variance[..., None, None]
        return GaussianMixture._unchecked(
            means=p.means, variances=variances, weights=p.weights, log_weights=p.log_weights
        )
    covariance = components(p.map(torch.Tensor.double)).covariances
    assert covariance is not None
    eye = torch.eye(p.dim, dtype=covariance.dtype, device=covariance.device)
    covariance = covariance + variance[..., None, None, None] * eye
    return GaussianMixture._unchecked(
        means=p.means, covariance_matrix=covariance, weights=p.weights, log_weights=p.log_weights
    )
