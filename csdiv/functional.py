"""The public functions: checked once here, documented here, computed by the operators.

Mixtures are :class:`csdiv.GaussianMixture`; where one is expected, what its ``from_distribution``, ``from_sklearn`` or
``from_scipy`` takes, or a module that returns a mixture when called, is accepted as well.
Batch dimensions broadcast, and a side that is shared by the batch is read once. float32 and float64 are computed in
the promoted dtype; float16 and bfloat16, also under autocast, are computed and returned in float32, with gradients in
the dtype of the input. Logarithms are in nats.

``backend`` is "auto", "reference", "cpu", "cuda" or "triton": :func:`csdiv.backend_status` tells which can run.
"auto" depends on the device alone, by the table in :mod:`csdiv.backends`; the command ``csdiv info --shape N M D``
tells its choice. Full covariances, also against others, are computed in float64 and rounded to the dtype at the end.
Where both sides have one covariance, as points have, they are whitened and cost what spherical ones do, at any D. Where
one side has, each component of the other is factored once. "cpu" and "cuda" have kernels for D ≤ 32; above that, and
where there are no CUDA kernels, torch's factorisations take their place. Factors are not multiplied out against points,
nor between two sides of one covariance ("cuda" does the former).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csdiv import backends, reference, weights
from csdiv.checks import as_float_tensor, computing_dtype
from csdiv.mixture import GaussianMixture
from csdiv.pairs import (
    DIAGONAL,
    MixtureLike,
    as_mixture,
    as_pair,
    check_batches,
    check_fit,
    component_divergence,
    cross_overlap,
    is_plain,
    route,
    row_overlap,
    self_overlap,
    widen,
    with_derivatives_at_zero,
)
from csdiv.transforms import full_like_device
from csdiv.weights import correction, zero_weights

_LOG_4PI = math.log(4.0 * math.pi)


def cs_divergence(
    p: MixtureLike,
    q: MixtureLike,
    *,
    p_self_overlap: Tensor | None = None,
    q_self_overlap: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Cauchy–Schwarz divergence of two Gaussian mixtures, in closed form.

    D_CS(p, q) = −log ∫pq + ½ log ∫p² + ½ log ∫q² = −log cos∠(p, q) in L2. It is ≥ 0 up to rounding, 0 exactly for
    proportional mixtures, symmetric, and does not change with the scale of either side's weights. The *squared*
    convention found elsewhere (Jenssen; Yu et al.) is twice this value.

    The three terms share one reference scale, so that |error| ≤ 2e-6 · max(1, D / 64) for p ≈ q in float32 on the CPU.

    Args:
        p, q: mixtures with N and M components in D dimensions; batch shapes broadcast.
        p_self_overlap, q_self_overlap: (*batch,) ``csdiv.log_overlap(p)`` and that of q, computed before: a side that
            is fixed then costs its N² pairs once. Gradients of that term go to the tensor given; its rounding enters
            the result, so give float64 where D_CS is near zero.
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
    p, q = as_pair(p, q)
    if p_self_overlap is None and _are_alone(p, q):
        known = None if q_self_overlap is None else known_self_overlap(q_self_overlap, q, "q", backend)
        if known is None or known.ndim == 0:
            return _divergence_of_components(p, q, known, backend)
    way, dtype = route(p, q, backend), p.means.dtype
    if way.formula == DIAGONAL and p_self_overlap is None and q_self_overlap is None:
        value = way.value("cs_divergence")
        return (
            value
            if p.weights is None and q.weights is None
            else _divergence_with_derivatives_at_zero(value, p, q, backend)
        )
    if way.formula != DIAGONAL:
        p, q = (side.map(torch.Tensor.double) for side in (p, q))
    own_p = known_self_overlap(p_self_overlap, p, "p", backend)
    own_q = known_self_overlap(q_self_overlap, q, "q", backend)
    return (0.5 * (own_p + own_q) - cross_overlap(p, q, backend)).to(dtype)


def _are_alone(p: GaussianMixture, q: GaussianMixture) -> bool:
    """Whether p is a batch of single Gaussians and q one mixture, both of variances, with weights that count once."""
    if p.means.shape[-2] != 1 or p.log_weights is not None or p.variances is None or q.variances is None:
        return False
    batch = p.batch_shape
    return bool(batch) and not q.batch_shape and batch.numel() > 0 and zero_weights(q) is None


def _divergence_of_components(p: GaussianMixture, q: GaussianMixture, known: Tensor | None, backend: str) -> Tensor:
    """:func:`cs_divergence` of these: as the components of one mixture, whose self terms have a closed form."""
    batch = p.batch_shape
    assert p.variances is not None
    means = p.means.expand(*batch, *p.means.shape[-2:]).flatten(0, -2)
    variances = p.variances
    if variances.ndim > 2:
        variances = variances.expand(*batch, *variances.shape[-2:]).flatten(0, -2)
    side = (q.means, q.variances, q.log_weights)
    return component_divergence("component_divergence", backend, means, variances, *side, known).reshape(batch)


def _divergence_with_derivatives_at_zero(value: Tensor, p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """D_CS with the gradients to linear weights that are zero."""
    with torch.no_grad():
        cross, *own = cross_overlap(p, q, backend), self_overlap(p, backend), self_overlap(q, backend)
    for side, other, self_term in ((p, q, own[0]), (q, p, own[1])):
        value = with_derivatives_at_zero(value, side, other, backend, -1.0, cross)
        value = with_derivatives_at_zero(value, side, side, backend, 1.0, self_term)
    return value


def known_self_overlap(given: Tensor | None, p: GaussianMixture, name: str, backend: str) -> Tensor:
    """log V(p, p) in float64, (*batch,): the value that was given, if any was."""
    if given is None:
        return self_overlap(p, backend).double()
    given = as_float_tensor(given, f"{name}_self_overlap")
    if given.device != p.means.device:
        raise ValueError(f"one device expected, got {name} on {p.means.device}, {name}_self_overlap on {given.device}")
    check_batches(p.batch_shape, given.shape, name, f"{name}_self_overlap")
    return given.double()


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
        p = widen(as_mixture(p, "p"))
        return self_overlap(p, backend).to(p.means.dtype)
    p, q = as_pair(p, q)
    return cross_overlap(p, q, backend).to(p.means.dtype)


def component_log_overlap(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j): the log overlap of each component of p with q.

    p's own weights are not used: log V(p, q) = logsumexp_i(log a_i + ℓ_i). With zero variances in p this is the
    log density of q at p's means, see :meth:`GaussianMixture.log_prob`.

    Returns:
        (*batch, N) nats. Gradients: to p's means and covariances and to every parameter of q; on the CPU those of the
        sum are computed with the values, and scaled where the upstream gradient is the same for all rows, as in a sum
        or a mean, else computed anew. Memory O((N + M) D). Raises: as :func:`cs_divergence`.
    """
    return _row_lse(*as_pair(p, q), backend)


def _row_lse(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    row_lse, offset = row_overlap(p, q, backend)
    return (row_lse if offset is None else row_lse + offset).to(p.means.dtype)


def pairwise_log_overlap(p: MixtureLike, q: MixtureLike, *, backend: str = "auto") -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j) for every pair of components; no weights are used.

    Returns:
        (*batch, N, M) nats, materialised: the other functions never are. Two points (zero variances) at one place
        give +inf, at different places −inf. Gradients: to means and covariances. Raises: as :func:`cs_divergence`.
    """
    p, q = as_pair(p, q)
    return route(p, q, backend).value("pairwise").to(p.means.dtype)


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
        log_variances: (*batch, B, D) log s; finite results for ±200 in float32, with prior variances up to 1e30. So are
            gradients on the CPU; on GPUs, where values decide nothing, float32 may overflow in those of codes below −20
            beside a prior as narrow.
        prior: a GaussianMixture, a :class:`csdiv.nn.GaussianMixturePrior` or a torch distribution; K components.
        prior_self_overlap: (*batch,) ``csdiv.log_overlap(prior)`` computed before, which skips the K² self term.
            To compute it every n steps only, use :class:`csdiv.nn.SelfOverlapExpansion`. A detached one is for priors
            that are not trained: half of a trained prior's gradient, what keeps components apart, comes from it.
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
    _check_codes(means, log_variances)
    prior = as_mixture(prior, "prior")
    check_fit(means, prior, "means", "prior")
    known, dtype = None, means.dtype
    if prior_self_overlap is not None:
        known = known_self_overlap(prior_self_overlap, prior, "prior", backend)
    if means.ndim != 2 or log_variances.dtype != dtype or not is_plain(prior, dtype):
        check_batches(means.shape[:-2], prior.batch_shape, "means", "prior")
        if prior.variances is None:
            return _regularizer_by_terms(means, log_variances, prior, known, backend)
        dtype = computing_dtype(torch.promote_types(torch.promote_types(dtype, log_variances.dtype), prior.dtype))
        prior, means, log_variances = widen(prior, dtype), means.to(dtype), log_variances.to(dtype)
    q = (prior.means, prior.variances, prior.log_weights)
    value = component_divergence("regularizer", backend, means, log_variances, *q, known)
    if zero_weights(prior) is None:
        return value
    capped = log_variances.detach().clamp(max=reference.LOG_VARIANCE_CAPS[dtype])
    codes = GaussianMixture._unchecked(means=means.detach(), variances=capped.exp())
    return value + _regularizer_derivatives_at_zero(codes, prior, known is None, backend).to(dtype)


def _check_codes(means: Tensor, log_variances: Tensor) -> None:
    if means.shape != log_variances.shape or means.ndim < 2:
        raise ValueError(
            "means and log_variances of one shape (*batch, B, D) expected, "
            f"got {tuple(means.shape)} and {tuple(log_variances.shape)}"
        )
    if means.device != log_variances.device:
        raise ValueError(
            f"one device expected, got means on {means.device} and log_variances on {log_variances.device}"
        )


def _regularizer_derivatives_at_zero(
    codes: GaussianMixture, prior: GaussianMixture, self_term: bool, backend: str
) -> Tensor:
    """Zeros, (*batch, B), with the gradients of :func:`cs_regularizer` to the prior's linear weights that are zero."""
    fixed = prior.detach()
    rows = _row_lse(codes, fixed, backend).double()
    missing = correction(prior, rows, lambda absent: route(codes, absent, backend).value("overlap_lse"))
    assert missing is not None
    if self_term:
        own = self_overlap(fixed, backend).double()
        zeros = torch.zeros_like(own)  # own itself may be infinite
        missing = missing - with_derivatives_at_zero(zeros, prior, prior, backend, 1.0, own).unsqueeze(-1)
    return -missing


def _regularizer_by_terms(
    means: Tensor, log_variances: Tensor, prior: GaussianMixture, known: Tensor | None, backend: str
) -> Tensor:
    """:func:`cs_regularizer` for priors with full covariances, in float64."""
    dtype = computing_dtype(torch.promote_types(torch.promote_types(means.dtype, log_variances.dtype), prior.dtype))
    prior, logs = widen(prior, torch.float64), log_variances.double()
    capped = logs.clamp(max=reference.LOG_VARIANCE_CAPS[torch.float64])
    codes = GaussianMixture._unchecked(means=means.double(), variances=capped.exp())  # B may be 0
    row_lse, offset = row_overlap(codes, prior, backend)
    cross = row_lse if offset is None else row_lse + offset
    own = torch.where(logs > capped, 0.25 * logs - 0.5 * capped, -0.25 * logs).sum(-1)
    self_term = self_overlap(prior, backend) if known is None else known
    return (own + 0.5 * self_term.unsqueeze(-1) - 0.25 * means.shape[-1] * _LOG_4PI - cross).to(dtype)


def log_prob(x: Tensor, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.log_prob`."""
    return _row_lse(*as_pair(points(x), p, "x", "p"), backend)


def pointwise_log_prob(x: Tensor, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.pointwise_log_prob`."""
    x = as_float_tensor(x, "x")
    if x.ndim < 1 or x.shape[-1] != p.dim:
        raise ValueError(f"x: (*batch, D) with D = {p.dim} expected, got {tuple(x.shape)}")
    check_batches(x.shape[:-1], p.batch_shape, "x", "p")
    return p.log_prob(x.unsqueeze(-2), backend=backend).squeeze(-1)


def responsibilities(x: Tensor | GaussianMixture, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.responsibilities`."""
    codes, p = as_pair(points(x), p, "x", "p")
    densities = route(codes, p, backend).value("pairwise")
    logits = densities
    if p.log_weights is not None:
        log_weights = torch.where(p.log_weights == math.inf, math.nan, p.log_weights)
        logits = reference.weighted(logits, log_weights.unsqueeze(-2))
    shares = logits.clamp(max=torch.finfo(logits.dtype).max).softmax(-1)  # infinite densities share equally
    if (missing := weights.share_correction(p, densities, logits)) is not None:
        shares = shares + (missing - shares.detach() * missing.sum(-1, keepdim=True))
    return shares.to(p.means.dtype)


def assign(x: Tensor | GaussianMixture, p: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """See :meth:`GaussianMixture.assign`."""
    codes, p = as_pair(points(x), p, "x", "p")
    return route(codes, p, backend).assign()


class Points(GaussianMixture):
    """Components that are known to be points, whatever may be asked of values."""

    __slots__ = ()

    @property
    def structure(self) -> str:
        return "points"


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
    return Points._unchecked(means=x, variances=full_like_device(x, (1, 1), 0.0))  # n may be 0


def warmup(device: torch.device | str | None = None, *, backend: str = "auto") -> None:
    """Loads the kernels onto a device, so that no later call waits for it and any CUDA graph can be captured.

    Every operator and its gradients are called once on tiny mixtures, in float32 and float64, and with full
    covariances. The time of the first call goes from milliseconds to microseconds; results do not change.

    Args:
        device: for example "cuda" or "cuda:1"; by default the current CUDA device if there is any, else the CPU.
        backend: see the module.

    Raises:
        RuntimeError: a backend asked for by name that cannot run on ``device``.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.empty(0, device=device).device  # with its index
    for dim in (8, 16, 32):  # gradients have a kernel for few, for some and for many dimensions
        for dtype in (torch.float32, torch.float64):
            ones = torch.ones(2, dim, dtype=dtype, device=where)
            _call_everything(GaussianMixture(ones, ones, log_weights=ones[:, 0]), backend)
    has_kernels = backend == "auto" or (backend != "reference" and backends.has_full(backend))
    for dim in (1, 2, 3, 4, 5, 8, 16, 32) if has_kernels else ():  # a kernel for each
        eye = torch.eye(dim, dtype=torch.float64, device=where).expand(2, dim, dim)
        _call_everything(GaussianMixture(eye[0, :1].expand(2, dim), covariance_matrix=eye), backend)
    backends.resolve(backend, where).loaded.add(where)


def _call_everything(p: GaussianMixture, backend: str) -> None:
    p, q = (p.map(lambda t: t.clone().requires_grad_()) for _ in range(2))
    values = (
        cs_divergence(p, q, backend=backend),
        log_overlap(p, q, backend=backend),
        log_overlap(p, backend=backend),
        component_log_overlap(p, q, backend=backend),
        pairwise_log_overlap(p, q, backend=backend),
        cs_regularizer(p.means, p.means, q, backend=backend),
    )
    torch.autograd.backward(values, [torch.ones_like(value) for value in values])
    q.assign(p, backend=backend)
