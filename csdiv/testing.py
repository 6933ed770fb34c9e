"""The error budget that every backend is held to, and random mixtures: for tests of csdiv and of code built on it.

Against float64,  |error| ≤ 2 |error of eager| + band,  band = 4 eps max(1, S), where eager is the broadcasted torch
code that a user would write, in the same dtype, and S is the size of what has to be added up,

    S = Σ_ij r_ij S_ij,    S_ij = |log a_i| + |log b_j| + ½ Σ_d δ²/c + ½ Σ_d |log c/c₀|,

the largest over the terms of a result; r_ij is the share of a pair in its sum, equation (5) of docs/math.md. Where
eager is not finite the band alone holds. c₀ is a scale for each dimension, the one choice that cancels in D_CS:
log c₀ = ½ (mean_i log 2s_i + mean_j log 2t_j).

Gradients are sums of r_ij w_ij with w = δ/c, ½ (δ²/c² − 1/c) or 1. To first order the relative error of r_ij is the
error of the pair's exponent, 4 eps S_ij, plus that of log V, 4 eps S; w adds a few eps. So the band of a gradient is
4 eps Σ_ij r_ij |w_ij| (1 + S_ij + S), |w_ij| with δ²/c² + 1/c; it needs no tuning and holds for each element. A share
below the smallest normal number may be flushed to zero, and so may what it is with the gradient g of its sum, which
adds Σ_ij min(|g| r_ij, max(|g|, 1) tiny) |w_ij|.

With full covariances C = L Lᵀ, the computed factor is that of C + E, |E| ≤ eps F, F = |L||L|ᵀ (Higham, Accuracy and
Stability of Numerical Algorithms, theorem 10.3), which changes δᵀC⁻¹δ by uᵀEu, u = C⁻¹δ, and log|C| by tr C⁻¹E. So in
S_ij ½ |u|ᵀF|u| + ½ Σ |C⁻¹|∘F stands for ½ Σ δ²/c, and log L_dd² for log c; in |w| v = |C⁻¹|F|u| stands for |δ|/c, and
½ (v vᵀ + |C⁻¹|F|C⁻¹|) for ½ (δ²/c² + 1/c). Where C is diagonal this is as above, but for ½ D in S_ij.

An ``entry`` names what is computed: one of :data:`ENTRIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csdiv.mixture import GaussianMixture

ENTRIES = (
    "cs_divergence",
    "log_overlap",
    "self_overlap",
    "component_log_overlap",
    "pairwise_log_overlap",
    "cs_regularizer",
    "log_prob",
    "responsibilities",
)
"""csdiv's functions and methods; "self_overlap" is ``log_overlap(p)``."""

STRUCTURES = ("diagonal", "spherical", "tied diagonal", "tied spherical", "full", "tied full", "points")
"""What :func:`random_mixture` makes; "points" are components of zero variance."""


def random_mixture(
    num_components: int,
    dim: int,
    *,
    batch_shape: Sequence[int] = (),
    structure: str = "diagonal",
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    decades: float = 0.3,
    generator: torch.Generator | None = None,
) -> GaussianMixture:
    """A mixture with means ``spread`` · N(0, 1), variances 10^U(−decades, decades) and random normalised weights.

    Args:
        num_components, dim, batch_shape: K, D and the leading dimensions of every parameter.
        structure: one of :data:`STRUCTURES`. Full covariances are R Rᵀ, with the variances on R's diagonal.
        dtype: of the parameters; they are drawn in float64.
    """
    if structure not in STRUCTURES:
        raise ValueError(f"structure: one of {', '.join(map(repr, STRUCTURES))} expected, got {structure!r}")

    def draw(function: Callable[..., Tensor], *shape: int) -> Tensor:
        return function(*batch_shape, *shape, dtype=torch.float64, generator=generator)

    means = spread * draw(torch.randn, num_components, dim)
    log_weights = draw(torch.randn, num_components).log_softmax(-1).to(dtype)
    rows = 1 if structure.startswith("tied") else num_components
    columns = 1 if structure.endswith("spherical") else dim
    variances = 10.0 ** (decades * (2.0 * draw(torch.rand, rows, columns) - 1.0))
    if structure.endswith("full"):
        factor = draw(torch.randn, rows, dim, dim).tril(-1) / dim + variances.diag_embed()
        return GaussianMixture(means.to(dtype), scale_tril=factor.to(dtype), log_weights=log_weights)
    if structure == "points":
        variances = torch.zeros(1, 1)
    return GaussianMixture(means.to(dtype), variances.to(dtype), log_weights=log_weights)


def mixture_of(
    means: Tensor, variances: Tensor | None = None, log_weights: Tensor | None = None, **options: Any
) -> GaussianMixture:
    """The mixture of tensors in this order, as lists of leaves have them; ``options`` as for the mixture."""
    return GaussianMixture(means, variances, log_weights=log_weights, **options)


def eager(entry: str, p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """``entry`` as plain broadcasted torch: what a user would write, in the dtype of the mixtures.

    p has the rows, of "cs_regularizer" the codes (with variances) and of "log_prob" and "responsibilities" the points;
    "self_overlap" does not look at q.
    """

    def pairs(p: GaussianMixture, q: GaussianMixture) -> Tensor:
        delta = p.means.unsqueeze(-2) - q.means.unsqueeze(-3)
        if p.variances is not None and q.variances is not None:
            c = _variances(p).unsqueeze(-2) + _variances(q).unsqueeze(-3)
            return -0.5 * (delta * delta / c + c.log() + math.log(2.0 * math.pi)).sum(-1)
        factor = torch.linalg.cholesky(_covariances(p).unsqueeze(-3) + _covariances(q).unsqueeze(-4))
        z = torch.linalg.solve_triangular(factor, delta.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * ((z * z).sum(-1) + log_det + p.dim * math.log(2.0 * math.pi))

    def rows(p: GaussianMixture, q: GaussianMixture) -> Tensor:
        return torch.logsumexp(pairs(p, q) + _log_weights(q).unsqueeze(-2), -1)

    def overlap(p: GaussianMixture, q: GaussianMixture) -> Tensor:
        return torch.logsumexp(rows(p, q) + _log_weights(p), -1)

    if entry == "cs_divergence":
        return 0.5 * overlap(p, p) + 0.5 * overlap(q, q) - overlap(p, q)
    if entry == "log_overlap":
        return overlap(p, q)
    if entry == "self_overlap":
        return overlap(p, p)
    if entry == "pairwise_log_overlap":
        return pairs(p, q)
    if entry == "responsibilities":
        return (pairs(p, q) + _log_weights(q).unsqueeze(-2)).softmax(-1)
    if entry == "cs_regularizer":
        own = -0.5 * (_variances(p).log() + math.log(4.0 * math.pi)).sum(-1)
        return 0.5 * own + 0.5 * overlap(q, q).unsqueeze(-1) - rows(p, q)
    return rows(p, q)


def magnitude(entry: str, p: GaussianMixture, q: GaussianMixture, *, scaled: bool = True) -> Tensor:
    """S of the module's text, float64, in the shape of the entry's result.

    Args:
        scaled: False puts c₀ = 1/2π, for formulas that do not take a scale out of the sum, as the reference.
    """
    sizes = [
        term.total.unsqueeze(-1) if entry == "cs_regularizer" and term.normalised == 2 else term.total
        for term in _terms(entry, p, q, scaled)
    ]
    size = sizes[0]
    for other in sizes[1:]:
        size = torch.maximum(size, other)
    return size


def band(
    entry: str, p: GaussianMixture, q: GaussianMixture, *, dtype: torch.dtype = torch.float32, scaled: bool = True
) -> Tensor:
    """4 eps max(1, S), eps of the computing ``dtype``, in the shape of the entry's result."""
    unit = 4.0 * torch.finfo(dtype).eps
    if entry == "responsibilities":  # a share r_ij errs as a gradient's does
        (term,) = _terms(entry, p, q, scaled)
        return unit * term.shares * (1.0 + term.sizes + term.total.unsqueeze(-1))
    return unit * magnitude(entry, p, q, scaled=scaled).clamp(min=1.0)


def gradient_bands(
    entry: str,
    p: GaussianMixture,
    q: GaussianMixture,
    grad: Tensor,
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    scaled: bool = True,
) -> list[Tensor]:
    """The band of the gradient of Σ grad · entry(p, q) for each of ``inputs``, elementwise.

    Args:
        p, q: float64 mixtures made, differentiably, from ``inputs``.
        grad: in the shape of the entry's result.

    The sums of absolute values are themselves gradients, of Σ_ij W_ij Σ_d (|δ|/c (μ + ν) + ½ (δ²/c² + 1/c) (s + t)) +
    Σ_ij W_ij (log a_i + log b_j) with everything but the parameters held fixed; so torch sums them over whatever the
    parameters are shared by.
    """
    size = grad.detach().double().abs()
    unit, tiny = 4.0 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    total = torch.zeros((), dtype=torch.float64)
    for term in _terms(entry, p, q, scaled):
        if entry == "responsibilities":  # ∂r_ij = r_ij (∂l_ij − Σ_k r_ik ∂l_ik)
            outer = size + (size * term.shares).sum(-1, keepdim=True)
        else:
            outer = size.sum(-1) if entry == "cs_regularizer" and term.normalised == 2 else size
            outer = term.factor * _unsqueeze(outer, term.normalised)
        errors = unit * term.shares * (1.0 + term.sizes + _unsqueeze(term.total, term.normalised))
        flushed = torch.minimum(outer * term.shares, tiny * outer.clamp(min=1.0))
        total = total + _absolute(term, outer * errors + flushed)
    if entry == "cs_regularizer":
        total = total + 0.25 * unit * (size.unsqueeze(-1) * _variances(p).log()).sum()
    return [g.abs() for g in torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)]


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, band: Tensor | float, *, relative_l2: float | None = None
) -> None:
    """Raises AssertionError unless |actual − exact| ≤ 2 |eager − exact| + band for every element.

    Half a unit in the last place of ``actual``'s dtype is added, for the rounding of the result itself, and the
    smallest normal number. Infinities and NaNs, also from overflow of ``actual``'s dtype, must be those of ``exact``;
    from a quarter of the largest number on, where squares overflow before they are halved, ``actual`` may be infinite.

    Args:
        actual, eager: any dtype; eager may be infinite or NaN, and then excuses nothing.
        exact: float64. Where ``actual`` is float64 too, both err by the band, and it counts twice.
        band: broadcastable to them.
        relative_l2: also ‖actual − exact‖ ≤ relative_l2 ‖exact‖, or twice the error of eager in the same norm. Not for
            gradients that are zero by cancellation.
    """
    info = torch.finfo(actual.dtype)
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    wide, rounded = actual.double(), exact.to(actual.dtype).double()
    overflow = (wide == exact.sign() * math.inf) & (exact.abs() > 0.25 * info.max)
    special = ~rounded.isfinite() | overflow
    rounded = torch.where(overflow, wide, rounded)
    torch.testing.assert_close(wide[special], rounded[special], equal_nan=True, rtol=0.0, atol=0.0)
    error = torch.where(special, 0.0, (wide - exact).abs())
    excused = 2.0 * (eager.double() - exact).abs()
    excused = torch.where(special | ~excused.isfinite(), 0.0, excused)
    allowed = excused + (2.0 if actual.dtype == torch.float64 else 1.0) * band
    allowed = torch.where(special, 0.0, allowed + 0.5 * info.eps * exact.abs() + info.tiny)
    bad = ~(error <= allowed)
    if bool(bad.any()):
        worst = int(torch.where(bad, (error / allowed).nan_to_num(nan=math.inf), -1.0).argmax())
        at = [t.broadcast_to(exact.shape).flatten()[worst].item() for t in (wide, exact, error, allowed)]
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} elements out of budget, worst at flat index {worst}: "
            f"{at[0]:.9g} for {at[1]:.9g}, error {at[2]:.3g}, allowed {at[3]:.3g}"
        )
    if relative_l2 is not None:
        relative_l2 += info.eps  # of the rounding
        norm, limit = error.norm(), relative_l2 * torch.where(special, 0.0, exact).norm()
        limit = torch.maximum(limit, excused.norm()) + info.tiny
        assert bool(norm <= limit), f"relative L2 error out of budget: {norm:.3g}, allowed {limit:.3g}"


class _Term(NamedTuple):
    """One log-sum-exp of a result, everything float64 and without gradients but p and q."""

    p: GaussianMixture
    q: GaussianMixture
    normalised: int  # over how many of the pair dimensions the shares sum to one: 2, 1 or 0
    factor: float
    shares: Tensor  # (*batch, N, M) r_ij
    sizes: Tensor  # (*batch, N, M) S_ij, 0 where r_ij is
    total: Tensor  # S, (*batch,), (*batch, N) or (*batch, N, M)


def _terms(entry: str, p: GaussianMixture, q: GaussianMixture, scaled: bool) -> list[_Term]:
    if entry not in ENTRIES:
        raise ValueError(f"entry: one of {', '.join(map(repr, ENTRIES))} expected, got {entry!r}")
    if entry == "cs_divergence":
        scale = _log_scale(p, q) if scaled else None
        halves = [_log_scale(p, p), _log_scale(q, q)] if scale is not None else [None, None]
        return [
            _term(p, q, 2, 1.0, scale),
            _term(p, p, 2, 0.5, halves[0]),
            _term(q, q, 2, 0.5, halves[1]),
        ]
    if entry == "self_overlap":
        q = p
    normalised = {"log_overlap": 2, "self_overlap": 2, "pairwise_log_overlap": 0}.get(entry, 1)
    terms = [_term(p, q, normalised, 1.0, _log_scale(p, q) if scaled else None)]
    if entry == "cs_regularizer":
        terms.append(_term(q, q, 2, 0.5, _log_scale(q, q) if scaled else None))
    return terms


@torch.no_grad()
def _term(p: GaussianMixture, q: GaussianMixture, normalised: int, factor: float, log_scale: Tensor | None) -> _Term:
    pairs = _pairs(p, q)
    if log_scale is None:
        log_scale = torch.tensor(-math.log(2.0 * math.pi), dtype=torch.float64)
    else:
        log_scale = log_scale[..., None, None, :]
    logits = pairs.exponents - 0.5 * pairs.log_scales.sum(-1)
    sizes = pairs.sizes + 0.5 * (pairs.log_scales - log_scale).abs().sum(-1)
    for count, weights in ((2, _log_weights(p).unsqueeze(-1)), (1, _log_weights(q).unsqueeze(-2))):
        if normalised >= count:
            logits, sizes = logits + weights.double(), sizes + weights.double().abs()
    if normalised == 2:
        shares = logits.flatten(-2).softmax(-1).view_as(logits)
    else:
        shares = logits.softmax(-1) if normalised else torch.ones_like(logits)
    sizes = torch.where(shares == 0.0, 0.0, sizes)
    total = shares * sizes
    return _Term(p, q, normalised, factor, shares, sizes, total.sum((-1, -2)[:normalised]) if normalised else total)


def _absolute(term: _Term, shares: Tensor) -> Tensor:
    """The function whose gradients are Σ shares |w|; see :func:`gradient_bands`."""
    p, q = term.p, term.q
    with torch.no_grad():
        pairs = _pairs(p, q)
        shares = torch.where(shares == 0.0, 0.0, shares)
        means = shares.unsqueeze(-1) * pairs.mean_sizes.nan_to_num(posinf=0.0)
        event = 1 + pairs.spread_sizes.ndim - pairs.mean_sizes.ndim
        spreads = _unsqueeze(shares, event) * pairs.spread_sizes.nan_to_num(posinf=0.0)
    value = (means * (p.means.unsqueeze(-2) + q.means.unsqueeze(-3))).sum()
    own = _variances if event == 1 else _absolute_covariances
    value = value + (spreads * (own(p).unsqueeze(-1 - event) + own(q).unsqueeze(-2 - event))).sum()
    for count, side, dim in ((2, p, -1), (1, q, -2)):
        if term.normalised >= count and side.log_weights is not None:
            finite = torch.where(side.log_weights == -math.inf, 0.0, side.log_weights)
            value = value + (shares * finite.unsqueeze(dim)).sum()
    return value


class _Pairs(NamedTuple):
    """What the budget takes from every pair, float64; the first is of the diagonal formula and the full one alike."""

    exponents: Tensor  # (*batch, N, M) −½ δᵀC⁻¹δ
    sizes: Tensor  # (*batch, N, M) what S_ij has beside logarithms
    log_scales: Tensor  # (*batch, N, M, D) log c or log L_dd²
    mean_sizes: Tensor  # (*batch, N, M, D) |w| for the means
    spread_sizes: Tensor  # (*batch, N, M, D) for variances, or (*batch, N, M, D, D) for covariances


def _pairs(p: GaussianMixture, q: GaussianMixture) -> _Pairs:
    delta = p.means.double().unsqueeze(-2) - q.means.double().unsqueeze(-3)
    if p.variances is not None and q.variances is not None:
        c = _variances(p).double().unsqueeze(-2) + _variances(q).double().unsqueeze(-3)
        squares = 0.5 * (delta * delta / c).sum(-1)
        return _Pairs(-squares, squares, c.log(), delta.abs() / c, 0.5 * ((delta / c) ** 2 + 1.0 / c))
    c = _covariances(p).double().unsqueeze(-3) + _covariances(q).double().unsqueeze(-4)
    factor = torch.linalg.cholesky(c)
    inverse = torch.cholesky_inverse(factor)
    solved = inverse @ delta.unsqueeze(-1)
    size = factor.abs() @ factor.abs().mT
    spread = inverse.abs() @ size
    mean = spread @ solved.abs()
    return _Pairs(
        -0.5 * (delta * solved.squeeze(-1)).sum(-1),
        0.5 * ((solved.abs() * (size @ solved.abs())).sum((-2, -1)) + (inverse.abs() * size).sum((-2, -1))),
        2.0 * factor.diagonal(dim1=-2, dim2=-1).log(),
        mean.squeeze(-1),
        0.5 * (mean @ mean.mT + spread @ inverse.abs()),
    )


def _log_scale(p: GaussianMixture, q: GaussianMixture) -> Tensor:
    """log c₀, (*batch, D); a side that has points leaves it to the other."""
    sides = [side for side in (p, q) if bool((_variances(side) > 0.0).all())]
    scales = [(2.0 * _variances(side).detach().double()).log().mean(-2) for side in sides]
    return sum(scales, start=torch.zeros((), dtype=torch.float64)) / len(scales)


def _variances(p: GaussianMixture) -> Tensor:
    """(*batch, K, D); of a full covariance its diagonal."""
    if p.variances is None:
        return _covariances(p).diagonal(dim1=-2, dim2=-1)
    return p.variances.expand(*p.variances.shape[:-2], p.num_components, p.dim)


def _covariances(p: GaussianMixture) -> Tensor:
    """(*batch, K, D, D)."""
    if p.variances is not None:
        return _variances(p).diag_embed()
    factor = p.factor if p.scale_tril is None else p.scale_tril.tril()
    covariance = p.covariance_matrix if factor is None else factor @ factor.mT
    assert covariance is not None
    return covariance.expand(*covariance.shape[:-3], p.num_components, p.dim, p.dim)


def _absolute_covariances(p: GaussianMixture) -> Tensor:
    """Covariances whose gradients are sums of absolute values, up to their signs."""
    has_factor = p.scale_tril is not None or p.factor is not None
    return _covariances(p.map(torch.abs) if has_factor else p)


def _log_weights(p: GaussianMixture) -> Tensor:
    if p.log_weights is not None:
        return p.log_weights
    return p.means.new_full((p.num_components,), -math.log(p.num_components))


def _unsqueeze(t: Tensor, count: int) -> Tensor:
    return t.view(*t.shape, *(1,) * count) if count else t
