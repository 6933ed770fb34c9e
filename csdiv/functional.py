"""The public functions: checked once here, documented here, computed by the operators.

Mixtures are :class:`csdiv.GaussianMixture`; where one is expected, a ``torch.distributions`` object that
``GaussianMixture.from_distribution`` takes, or a module that returns a mixture when called, is accepted as well.
Batch dimensions broadcast, and a side that is shared by the batch is read once. float32 and float64 are computed in
the promoted dtype; float16 and bfloat16, also under autocast, are computed and returned in float32, with gradients in
the dtype of the input. Logarithms are in nats.

``backend`` is "auto", "reference", "cpu", "cuda" or "triton": :func:`csdiv.backend_status` tells which can run.
"auto" depends on the device, the structure, N, M and D alone, by the table in :mod:`csdiv.backends.dispatch`; the
command ``csdiv info --shape N M D`` tells its choice. Full covariances, also against others, are computed in float64
on CPU tensors with D ≤ 32, and rounded to the dtype at the end; elsewhere by the reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csdiv import autograd, backends, ops, reference
from csdiv.mixture import MATRICES, GaussianMixture, as_bandwidth, as_float_tensor

_LOG_4PI = math.log(4.0 * math.pi)

MixtureLike = GaussianMixture | torch.distributions.Distribution | torch.nn.Module
"""A mixture, a distribution that ``GaussianMixture.from_distribution`` takes, or a module that returns a mixture."""


def cs_divergence(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    r"""Cauchy–Schwarz divergence of two Gaussian mixtures, in closed form.

    D_CS(p, q) = −log ∫pq + ½ log ∫p² + ½ log ∫q² = −log cos∠(p, q) in L2. It is ≥ 0 up to rounding, 0 exactly for
    proportional mixtures, symmetric, and does not change with the scale of either side's weights. The *squared*
    convention found elsewhere (Jenssen; Yu et al.) is twice this value.

    The three terms share one reference scale, so that |error| ≤ 2e-6 · max(1, D / 64) for p ≈ q in float32 on the CPU.

    Args:
        p, q: mixtures with N and M components in D dimensions; batch shapes broadcast.
        backend: see the module.

    Returns:
        (*batch,) nats; +inf where the mixtures are too far apart for the dtype, NaN where one side has no weight.

    Gradients:
        To every parameter of both sides that requires one; the native backward is handwritten, the second derivative
        goes through the reference. Memory O((N + M) D) in both directions.

    Raises:
        ValueError: dimensions, batch shapes or devices that do not fit, or an unknown backend.
        RuntimeError: a backend asked for by name that cannot run here.
        NotImplementedError: a native backend asked for by name under jvp and nested derivatives, or for a
            full covariance that it does not have.

    Source: Kampa, Hasanbelliu, Principe, "Closed-form Cauchy–Schwarz PDF divergence for mixture of Gaussians",
    IJCNN 2011, with the self terms corrected (docs/math.md, section 5).
    """
    p, q = _pair(p, q)
    if _takes_reference(backend, p, q):
        return reference.cs_divergence(_components(p), _components(q))
    if _has_full(p, q):
        wide_p, wide_q = (side.map(torch.Tensor.double) for side in (p, q))
        own = _self_overlap(wide_p, backend) + _self_overlap(wide_q, backend)
        return (0.5 * own - _cross_overlap(wide_p, wide_q, backend)).to(p.dtype)
    return autograd.cs_divergence(backend, *_weighted(p), *_weighted(q))


def log_overlap(p: MixtureLike, q: MixtureLike | None = None, *, backend: str = "auto") -> Tensor:
    """log V(p, q) = log ∫ p(x) q(x) dx, the logarithm of the cross information potential.

    Args:
        p, q: mixtures; weights are used as given. ``log_overlap(p)`` is the self term log V(p, p), which takes half
            the work of ``log_overlap(p, p)``.
        backend: see the module.

    Returns:
        (*batch,) nats; −inf where no pair of components overlaps in the dtype, with zero gradients.

    Gradients: to every parameter. Memory O((N + M) D). Raises: as :func:`cs_divergence`.
    """
    if q is None:
        p = _widen(as_mixture(p, "p"))
        return _self_overlap(p, backend).to(p.dtype)
    p, q = _pair(p, q)
    return _cross_overlap(p, q, backend).to(p.dtype)


def component_log_overlap(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j): the log overlap of each component of p with q.

    p's own weights are not used: log V(p, q) = logsumexp_i(log a_i + ℓ_i). With zero variances in p this is the
    log density of q at p's means, see :meth:`GaussianMixture.log_prob`.

    Returns:
        (*batch, N) nats. Gradients: to p's means and covariances and to every parameter of q; on the CPU those of the
        sum are computed with the values, and scaled where the upstream gradient is the same for all rows, as in a sum
        or a mean, else computed anew. Memory O((N + M) D). Raises: as :func:`cs_divergence`.
    """
    p, q = _pair(p, q)
    value, offset = _rows(p, q, backend)
    return (value if offset is None else value + offset).to(p.dtype)


def pairwise_log_overlap(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j) for every pair of components; no weights are used.

    Returns:
        (*batch, N, M) nats, materialised: the other functions never are. Two points (zero variances) at one place
        give +inf, at different places −inf. Gradients: to means and covariances. Raises: as :func:`cs_divergence`.
    """
    p, q = _pair(p, q)
    if _takes_reference(backend, p, q):
        return reference.pairwise_log_overlap(_components(p), _components(q))
    if _has_full(p, q):
        return autograd.full_pairwise(backend, *_matrices(p)[:2], *_matrices(q)[:2]).to(p.dtype)
    return autograd.pairwise(backend, *_unweighted(p), *_unweighted(q))


def renyi2_entropy(p: MixtureLike, *, backend: str = "auto") -> Tensor:
    """Rényi entropy of order 2, H₂(p) = −log ∫ p(x)² dx, (*batch,) nats. Raises: as :func:`cs_divergence`."""
    return -log_overlap(p, backend=backend)


def cosine_similarity(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """cos∠(p, q) = V(p, q) / √(V(p, p) V(q, q)) = exp(−D_CS(p, q)), the Carbó similarity, (*batch,) in [0, 1].

    It does not change with the scale of either side's weights; above 1 by rounding only. Errors, gradients, memory and
    Raises: as :func:`cs_divergence`.
    """
    return cs_divergence(p, q, backend=backend).neg().exp()


def ise(p: MixtureLike, q: MixtureLike, *, log: bool = False, backend: str = "auto") -> Tensor:
    """Integrated squared error ∫ (p − q)² = V(p, p) − 2 V(p, q) + V(q, q), equation (12).

    Weights are used as given: for two intensities of Poisson processes, half of it is their Cauchy–Schwarz divergence.

    The three overlaps are combined in float64 relative to the larger self term. For p ≈ q in float32 on the CPU
    |error| ≤ V · 4e-6 · max(1, D / 64), V ≈ V(p, p) ≈ V(q, q), to first order in p − q, equation (13). For differences
    below that, give mixtures in float64.

    Args:
        p, q: mixtures; batch shapes broadcast. A side without any weight is the zero function.
        log: whether to return log ISE, which stays finite where ISE leaves the dtype's range.
        backend: see the module.

    Returns:
        (*batch,) ≥ 0 up to rounding, in units of 1 / volume; with ``log`` in nats, −inf where no difference is left
        (at p = q: −inf, or as much below log V as rounding allows).

    Gradients: to every parameter, zero up to rounding at p = q; with ``log`` zero where the value is −inf.
    Memory O((N + M) D). Raises: as :func:`cs_divergence`.

    Source: Williams, Maybeck, "Cost-function-based Gaussian mixture reduction for target tracking", FUSION 2003; Hoang,
    Vo, Vo, Mahler, "The Cauchy–Schwarz divergence for Poisson point processes", IEEE Trans. Inf. Theory 61, 2015.
    """
    p, q = _pair(p, q)
    scale, pq, pp, qq = _scaled_overlaps(p, q, backend)
    return _unscaled(scale, (pp - pq) + (qq - pq), log).to(p.dtype)


def nise(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """Normalised integrated squared error ∫ (p − q)² / (∫ p² + ∫ q²) = 1 − 2 V(p, q) / (V(p, p) + V(q, q)).

    Returns:
        (*batch,) in [0, 1] up to rounding: 0 iff p = q, 1 iff nothing overlaps; NaN where neither side has any weight.
        For p ≈ q in float32 on the CPU |error| ≤ 2e-6 · max(1, D / 64), see :func:`ise`.

    Gradients: to every parameter. Memory O((N + M) D). Raises: as :func:`cs_divergence`. Source: equation (14).
    """
    p, q = _pair(p, q)
    _, pq, pp, qq = _scaled_overlaps(p, q, backend)
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
    p, q = _pair(p, q)
    bandwidth = as_bandwidth(bandwidth, p.means).to(p.dtype)
    if bandwidth.device != p.device:
        raise ValueError(f"one device expected, got p on {p.device} and bandwidth on {bandwidth.device}")
    for side, name in ((p, "p"), (q, "q")):
        _check_batches(side.batch_shape, bandwidth.shape, name, "bandwidth")
    half_squared = 0.5 * torch.where(bandwidth > 0.0, bandwidth, math.nan).square()
    scale, pq, pp, qq = _scaled_overlaps(_convolved(p, half_squared), _convolved(q, half_squared), backend)
    log_factor = 0.5 * p.dim * (half_squared.double().log() + _LOG_4PI)
    return _unscaled(scale + log_factor, (pp - pq) + (qq - pq), log).to(p.dtype)


def channel_log_overlap(
    p: MixtureLike, q: MixtureLike, p_log_weights: Tensor, q_log_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """log V of every pair of channels: weightings c of p's components with weightings c′ of q's, equation (16).

    Soft assignments, class posteriors and bags of samples are such weightings. ``log_overlap`` of a batch of mixtures
    that share their components would go over all pairs of components C C′ times; this goes min(C, C′) times, and takes
    one log-sum over the components of a side for each pair of channels.

    Args:
        p, q: mixtures with N and M components; their own weights are not used.
        p_log_weights: (*batch, C, N), as given; −inf is a weight of zero.
        q_log_weights: (*batch, C′, M).
        backend: see the module.

    Returns:
        (*batch, C, C′) nats.

    Gradients: to means and covariances of both sides, and to the weights. Memory O((N + M) D + min(C, C′) (N + M)) and
    at most ``csdiv.reference.CHUNK_ELEMENTS`` numbers. Raises: as :func:`cs_divergence`.
    """
    p, q = _pair(p, q)
    p, q = _one_dtype(_channels(p, p_log_weights, "p"), _channels(q, q_log_weights, "q"))
    _check_batches(p.batch_shape[:-1], q.batch_shape[:-1], "p", "q")
    if p.batch_shape[-1] < q.batch_shape[-1]:
        return _overlap_by_channels(q, p, backend).mT
    return _overlap_by_channels(p, q, backend)


def cs_regularizer(
    means: Tensor,
    log_variances: Tensor,
    prior: MixtureLike,
    *,
    prior_self_overlap: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """D_CS(N(m_b, diag s_b), prior) for each row b of a batch of codes: the Kullback–Leibler term's replacement.

    The B codes run as B rows against one prior, whose self term is computed once.

    Args:
        means: (*batch, B, D) code means.
        log_variances: (*batch, B, D) log s; finite results for ±200 in float32, with prior variances up to 1e30.
        prior: a GaussianMixture, a :class:`csdiv.nn.GaussianMixturePrior` or a torch distribution; K components.
        prior_self_overlap: (*batch,) ``csdiv.log_overlap(prior)`` computed before, which skips the K² self term; detach
            it to freeze it, or refresh it every n steps. Nothing is cached otherwise.
        backend: see the module.

    Returns:
        (*batch, B) nats.

    Gradients:
        To ``means``, ``log_variances``, the prior's parameters and ``prior_self_overlap``, each if required.
        Memory O((B + K) D). Raises: as :func:`cs_divergence`; ValueError if the shapes of the codes differ.

    Source: Tran, Pantic, Deisenroth, "Cauchy–Schwarz Regularized Autoencoder", JMLR 23(115), 2022.

    Example:
        >>> kl = csdiv.cs_regularizer(means, log_variances, prior)      # was: 0.5 * (means**2 + ...).sum(-1)
    """
    means, log_variances = as_float_tensor(means, "means"), as_float_tensor(log_variances, "log_variances")
    if means.shape != log_variances.shape or means.ndim < 2:
        raise ValueError(
            "means and log_variances of one shape (*batch, B, D) expected, "
            f"got {tuple(means.shape)} and {tuple(log_variances.shape)}"
        )
    if means.device != log_variances.device:
        raise ValueError(
            f"one device expected, got means on {means.device} and log_variances on {log_variances.device}"
        )
    prior = as_mixture(prior, "prior")
    dtype = _computing_dtype(torch.promote_types(torch.promote_types(means.dtype, log_variances.dtype), prior.dtype))
    log_variances = log_variances.to(dtype)
    # Above the cap s + t is s to rounding: exp(cap) stands in for s, and the rest of log s is added outside, (10).
    capped = log_variances.clamp(max=85.0 if dtype == torch.float32 else 700.0)
    codes = GaussianMixture._unchecked(means=means, variances=capped.exp())  # B may be 0
    codes, prior = _pair(codes, prior, "means", "prior")
    if prior_self_overlap is None:
        prior_self_overlap = _self_overlap(prior, backend)
    value, offset = _rows(codes, prior, backend)
    cross = value.double() if offset is None else value + offset
    # −log V(q, p) + ½ log V(q, q) + ½ log V(p, p) in float64, where the scales that cancel cost no accuracy;
    # log V(q, q) = −½ Σ log 4πs, and −log V(q, p) misses ½ Σ (log s − capped).
    own = 0.25 * log_variances.sum(-1, dtype=torch.float64) - 0.5 * capped.sum(-1, dtype=torch.float64)
    constant = 0.5 * prior_self_overlap.unsqueeze(-1) - 0.25 * means.shape[-1] * _LOG_4PI
    return (own + constant - cross).to(dtype)


def responsibilities(x: Tensor | GaussianMixture, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.responsibilities`."""
    codes, p = _pair(points(x), p, "x", "p")
    logits = pairwise_log_overlap(codes, p, backend=backend)
    return _add_log_weights(logits, None if p.log_weights is None else p.log_weights.unsqueeze(-2)).softmax(-1)


def assign(x: Tensor | GaussianMixture, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.assign`."""
    codes, p = _pair(points(x), p, "x", "p")
    if _takes_reference(backend, codes, p):
        return reference.assign(_components(codes), _components(p))
    with torch.no_grad():
        if _has_full(codes, p):
            return ops.full_assign(*_matrices(codes)[:2], *_matrices(p), backend)
        return ops.assign(*_unweighted(codes), *_weighted(p), backend)


def points(x: Tensor | GaussianMixture) -> GaussianMixture:
    """Points x (*batch, n, D) as components of zero variance; a mixture stays what it is.

    Raises:
        ValueError: x with fewer than 2 dimensions. TypeError: not floating point.
    """
    if isinstance(x, GaussianMixture):
        return x
    x = as_float_tensor(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x: (*batch, n, D) expected, got {tuple(x.shape)}")
    return GaussianMixture._unchecked(means=x, variances=x.new_zeros(1, 1))  # n may be 0


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


def _pair(p: Any, q: Any, p_name: str = "p", q_name: str = "q") -> tuple[GaussianMixture, GaussianMixture]:
    """Both sides as mixtures of one dtype, known to fit."""
    p, q = as_mixture(p, p_name), as_mixture(q, q_name)
    if p.dim != q.dim:
        raise ValueError(f"one dimension expected, got D = {p.dim} in {p_name} and D = {q.dim} in {q_name}")
    if p.device != q.device:
        raise ValueError(f"one device expected, got {p_name} on {p.device} and {q_name} on {q.device}")
    _check_batches(p.batch_shape, q.batch_shape, p_name, q_name)
    return _one_dtype(p, q)


def _one_dtype(p: GaussianMixture, q: GaussianMixture) -> tuple[GaussianMixture, GaussianMixture]:
    dtype = torch.promote_types(p.dtype, q.dtype)
    return _widen(p, dtype), _widen(q, dtype)


def _check_batches(p_batch: torch.Size, q_batch: torch.Size, p_name: str, q_name: str) -> None:
    if p_batch == q_batch:
        return
    try:
        torch.broadcast_shapes(p_batch, q_batch)
    except RuntimeError:
        raise ValueError(
            f"batch shapes that broadcast expected, got {tuple(p_batch)} in {p_name} and {tuple(q_batch)} in {q_name}"
        ) from None


def _computing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _widen(p: GaussianMixture, dtype: torch.dtype | None = None) -> GaussianMixture:
    """p in the dtype that is computed in: all tensors of one, half precision in float32."""
    dtype = _computing_dtype(p.dtype if dtype is None else dtype)
    if all(t.dtype == dtype for t in p._tensors()):
        return p
    return p.map(lambda t: t.to(dtype))


def _takes_reference(backend: str, *sides: GaussianMixture) -> bool:
    """Whether plain differentiable torch computes this call: asked for by name, or for a full covariance without it."""
    backends.check_name(backend)
    if backend == "reference" or not _has_full(*sides):
        return backend == "reference"
    dim, limit = sides[0].dim, backends.MAX_FULL_DIM
    if backend == "auto":
        return sides[0].device.type != "cpu" or dim > limit
    if backend != "cpu" or dim > limit:
        have = "no full covariances" if backend != "cpu" else f"full covariances up to D = {limit}, got D = {dim}"
        raise NotImplementedError(f'backend "{backend}" has {have}: take backend="auto" or "reference"')
    return False


def _has_full(*sides: GaussianMixture) -> bool:
    return any(side.variances is None for side in sides)


def _rows(p: GaussianMixture, q: GaussianMixture, backend: str) -> tuple[Tensor, Tensor | None]:
    """ℓ_i: value, float64 where a covariance is full, and what is to be added in float64, if anything."""
    if _takes_reference(backend, p, q):
        return reference.overlap_lse(_components(p), _components(q)), None
    if _has_full(p, q):
        return autograd.full_overlap_lse(backend, *_matrices(p)[:2], *_matrices(q)), None
    return autograd.overlap_lse(backend, *_unweighted(p), *_weighted(q))


def _cross_overlap(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V(p, q), (*batch,), in float64 where the backend has it."""
    if _takes_reference(backend, p, q):
        return reference.log_overlap(_components(p), _components(q))
    if _has_full(p, q):
        rows, _ = _rows(p, q, backend)
        return reference.logsumexp(_add_log_weights(rows, _matrices(p)[2]), -1)
    value, offset = autograd.log_overlap(backend, *_weighted(p), *_weighted(q))
    return value if offset is None else value + offset


def _self_overlap(p: GaussianMixture, backend: str) -> Tensor:
    """log V(p, p), (*batch,), in float64 where the backend has it."""
    if _takes_reference(backend, p):
        return reference.log_overlap(_components(p), _components(p))
    if _has_full(p):
        return autograd.full_self_overlap(backend, *_matrices(p))
    value, offset = autograd.self_overlap(backend, *_weighted(p))
    return value if offset is None else value + offset


def _scaled_overlaps(p: GaussianMixture, q: GaussianMixture, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The larger log self overlap, and V(p, q), V(p, p) and V(q, q) divided by its exponential; float64."""
    overlaps = (_cross_overlap(p, q, backend), _self_overlap(p, backend), _self_overlap(q, backend))
    pq, pp, qq = (value.double() for value in overlaps)
    scale = torch.maximum(pp, qq).detach()  # the result does not depend on it, and has no gradient through it
    scale = torch.where(scale.isinf(), 0.0, scale)
    return scale, (pq - scale).exp(), (pp - scale).exp(), (qq - scale).exp()


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
        return GaussianMixture._unchecked(means=p.means, variances=variances, log_weights=p.log_weights)
    covariance = _components(p).covariance
    assert covariance is not None
    eye = torch.eye(p.dim, dtype=covariance.dtype, device=covariance.device)
    covariance = covariance + variance[..., None, None, None] * eye
    return GaussianMixture._unchecked(means=p.means, covariance_matrix=covariance, log_weights=p.log_weights)


def _channels(p: GaussianMixture, log_weights: Tensor, name: str) -> GaussianMixture:
    """The batch of mixtures (*batch, C) that p's components make with ``log_weights`` (*batch, C, K)."""
    log_weights = as_float_tensor(log_weights, f"{name}_log_weights")
    if log_weights.ndim < 2 or log_weights.shape[-1] != p.num_components:
        raise ValueError(
            f"{name}_log_weights: (*batch, C, K) with K = {p.num_components} expected, got {tuple(log_weights.shape)}"
        )
    if log_weights.device != p.device:
        raise ValueError(f"one device expected, got {name} on {p.device} and weights on {log_weights.device}")
    _check_batches(p.batch_shape, log_weights.shape[:-2], name, f"{name}_log_weights")
    full = {n: t.unsqueeze(-4) for n in MATRICES if (t := getattr(p, n)) is not None}
    variances = None if p.variances is None else p.variances.unsqueeze(-3)
    means = p.means.unsqueeze(-3)
    return GaussianMixture._unchecked(means=means, variances=variances, log_weights=log_weights, **full)


def _overlap_by_channels(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V of p's channels with q's, (*batch, C, C′): one pass over the pairs for each of q's."""
    assert p.log_weights is not None
    if _takes_reference(backend, p, q):
        absent = p.log_weights.amax(-2, keepdim=True)  # −inf for components without weight in any channel
        components = reference.neutralise(_components(p)._replace(log_weights=absent))
        rows, offset = reference.overlap_lse(components, _components(q)), None
    else:
        rows, offset = _rows(p, q, backend)
    value = reference.channel_lse(p.log_weights.to(rows.dtype), rows)
    return (value if offset is None else value + offset.mT).to(p.dtype)


def _components(p: GaussianMixture) -> reference.Components:
    covariance = p.covariance_matrix
    if p.scale_tril is not None:
        with torch.autocast(p.device.type, enabled=False):
            covariance = p.scale_tril @ p.scale_tril.mT
    return reference.Components(p.means, p.variances, covariance, p.log_weights)


def _matrices(p: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariance matrices and log weights in float64, as the operators for full covariances take them."""
    wide = _components(p.map(torch.Tensor.double))
    return wide.means, reference.matrices(wide), reference.log_weights(wide)


def _weighted(p: GaussianMixture) -> tuple[Tensor | None, ...]:
    return p.means, p.variances, p.log_weights


def _unweighted(p: GaussianMixture) -> tuple[Tensor | None, ...]:
    return p.means, p.variances


def _add_log_weights(value: Tensor, log_weights: Tensor | None) -> Tensor:
    """value + log_weights; a weight of zero gives −inf, whatever the value."""
    if log_weights is None:
        return value
    return torch.where(log_weights == -math.inf, -math.inf, value + log_weights)


def warmup(device: torch.device | str | None = None, *, backend: str = "auto") -> None:
    """Loads the kernels onto a device, so that no later call waits for it and CUDA graphs can be captured.

    Every operator and its gradients are called once on two tiny mixtures, in float32 and float64. The time of the first
    call goes from milliseconds to microseconds; results do not change.

    Args:
        device: for example "cuda" or "cuda:1"; by default the current CUDA device if there is any, else the CPU.
        backend: see the module.

    Raises:
        RuntimeError: a backend asked for by name that cannot run on ``device``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.empty(0, device=device).device  # with its index
    for dtype in (torch.float32, torch.float64):
        for dim in (8, 16, 32):  # gradients have a kernel for few, for some and for many dimensions
            leaves = [torch.ones(2, *shape, dtype=dtype, device=where) for shape in ((dim,), (dim,), ())]
            p, q = (GaussianMixture(*(t.clone().requires_grad_() for t in leaves)) for _ in range(2))
            values = (
                cs_divergence(p, q, backend=backend),
                log_overlap(p, q, backend=backend),
                log_overlap(p, backend=backend),
                component_log_overlap(p, q, backend=backend),
                pairwise_log_overlap(p, q, backend=backend),
            )
            torch.autograd.backward(values, [torch.ones_like(value) for value in values])
            q.assign(p, backend=backend)
    devices = getattr(backends.resolve(backend, where), "loaded", None)
    if devices is not None:
        devices.add(where)
