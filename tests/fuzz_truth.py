"""The fuzzer's truth: log-sums, gradients and error budgets in NumPy's 80-bit numbers, without csdiv's or torch's code.

Numbers in parentheses are the equations of docs/math.md. Where a pair has full covariances its factor comes from a QR
decomposition of both factors side by side, or from a Cholesky decomposition if a covariance was given; 80 bits have 11
more than float64, so the truth errs by 1/2000 of what float64 does on the same factor. tests/test_fuzz.py compares it
with mpmath.

The budgets are those of equation (11) and of csdiv.testing, with the number format that csdiv states for a pair:
float64 where a covariance is full, else the dtype. Full covariances: with σ_d = √C_dd, what is computed is the factor
of C + E, |E| ≤ ε σσᵀ, or where factors are promised not to be multiplied out L + E, |E| ≤ ε σ in each row. Errors of
shares are not taken to first order: far from every component the exponents' rounding decides between shares of 0 and 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LD = np.longdouble
LOG_2PI = np.log(LD(2) * LD("3.14159265358979323846264338327950288"))
FAR = 2.0**16
"""Standard deviations up to which csdiv subtracts whitened means (csdiv.covariances.FAR)."""

Array = np.ndarray


class Side(NamedTuple):
    """A mixture with its batch flattened into one dimension B; 80 bits."""

    means: Array  # (B, K, D)
    log_weights: Array  # (B, K)
    variances: Array | None = None  # (B, K or 1, D), negative ones NaN
    factor: Array | None = None  # (B, K or 1, D, D)
    covariance: Array | None = None  # (B, K or 1, D, D)
    points: bool = False  # whether they are given to csdiv as points
    spherical: bool = False
    linear: bool = False  # whether weights themselves were given
    rounded: bool = False  # whether the logarithms of weights are taken by csdiv
    multiplied: bool = False  # whether csdiv says that it multiplies the factor out: in channels, and for shared means

    @property
    def full(self) -> bool:
        return self.variances is None

    @property
    def counts(self) -> Array:
        return self.log_weights != -np.inf

    def root(self) -> Array | None:
        """R with S = R Rᵀ, None if the covariance was given."""
        if self.variances is None:
            return self.factor
        return np.sqrt(self.variances)[..., None] * np.eye(self.means.shape[-1], dtype=LD)

    def matrix(self) -> Array:
        if self.covariance is not None:
            return self.covariance
        if self.factor is not None:
            return self.factor @ self.factor.swapaxes(-1, -2)
        assert self.variances is not None
        return self.variances[..., None] * np.eye(self.means.shape[-1], dtype=LD)


class Pairs(NamedTuple):
    """What a pair of sides has for each pair of components, (B, N, M, ...)."""

    logits: Array  # log N(μ_i; ν_j, S_i + T_j)
    sizes: Array  # S_ij of equation (11) without weights
    of_means: Array  # (..., D): δ/c or C⁻¹δ
    of_means_size: Array
    of_spread: Array  # (..., D), ½ (δ²/c² − 1/c); with full covariances C⁻¹ (B, N or 1, M or 1, D, D)
    of_spread_size: Array  # with full covariances (..., D), the a of ½ a aᵀ
    full: bool


def pairs_of(p: Side, q: Side, extra: Array, scaled: bool, plain: bool) -> Pairs:
    """``extra`` (B,) is added to every variance; ``scaled``: whether a scale may be taken out of the sum, as (8) does;
    ``plain``: whether it may be left in."""
    with np.errstate(all="ignore"):
        if p.full or q.full:
            return _full_pairs(p, q, extra)
        return _diagonal_pairs(p, q, extra, scaled, plain)


def _diagonal_pairs(p: Side, q: Side, extra: Array, scaled: bool, plain: bool) -> Pairs:
    assert p.variances is not None
    assert q.variances is not None
    delta = p.means[:, :, None] - q.means[:, None]
    c = p.variances[:, :, None] + q.variances[:, None] + extra[:, None, None, None]
    c = np.broadcast_to(c, delta.shape)
    z = delta / np.sqrt(c)
    squares = z * z
    far = np.isinf(squares)  # two points apart, or an infinite distance
    same = (c == 0) & (delta == 0)
    nan = np.isnan(np.where(same, 0, squares)) | np.isnan(c)
    logs = np.log(c) + LOG_2PI
    logits = -0.5 * np.where(far | same | nan, 0, squares + logs).sum(-1)
    logits = np.where(same.any(-1), np.inf, logits)
    logits = np.where(far.any(-1), -np.inf, logits)
    logits = np.where(nan.any(-1), np.nan, logits)
    shift = (_log_scale(p, q) + LOG_2PI)[:, None, None]
    rounded = [np.abs(logs - shift).sum(-1)] if scaled else []
    rounded += [np.abs(logs).sum(-1)] if plain else []
    sizes = 0.5 * (squares.sum(-1) + np.max(rounded, 0))
    if p.spherical and q.spherical and logits.size:
        totals = np.where(np.isfinite(logs), logs, 0).sum(-1)
        sizes = sizes + np.abs(totals - totals.mean((-1, -2), keepdims=True)).max() / 16
    ratio = delta / c
    return Pairs(
        logits,
        sizes,
        ratio,
        np.abs(ratio),
        0.5 * (ratio * ratio - 1 / c),
        0.5 * (ratio * ratio + 1 / c),
        False,
    )


def _log_scale(p: Side, q: Side) -> Array:
    """log c₀ (B, D): the mean of log 2s over the components, that of both sides; of one where the other has points."""
    scales = []
    for side in (p, q):
        assert side.variances is not None
        logs = np.log(2 * np.broadcast_to(side.variances, side.means.shape))
        known = np.isfinite(logs) & side.counts[..., None]
        scales.append((np.where(known, logs, 0).sum(1), known.sum(1)))
    means = [np.where(n > 0, total / np.maximum(n, 1), 0) for total, n in scales]
    known = [(n > 0).astype(LD) for _, n in scales]
    return (means[0] + means[1]) / np.maximum(known[0] + known[1], 1)


def _full_pairs(p: Side, q: Side, extra: Array) -> Pairs:
    dim = p.means.shape[-1]
    own = np.eye(dim, dtype=LD) * np.sqrt(extra)[:, None, None, None, None]
    roots = p.root(), q.root()
    if roots[0] is not None and roots[1] is not None:
        wide = np.concatenate(np.broadcast_arrays(roots[0][:, :, None], roots[1][:, None], own), -1)
        lower = _triangular(wide)
    else:
        lower = _cholesky(p.matrix()[:, :, None] + q.matrix()[:, None] + own * own)
    delta = p.means[:, :, None] - q.means[:, None]
    inverse = _inverse(lower)
    z = (inverse @ delta[..., None])[..., 0]
    u = (inverse.swapaxes(-1, -2) @ z[..., None])[..., 0]
    log_det = np.log(np.diagonal(lower, axis1=-2, axis2=-1))
    logits = -0.5 * (z * z).sum(-1) - log_det.sum(-1) - 0.5 * dim * LOG_2PI
    precision = inverse.swapaxes(-1, -2) @ inverse
    sigma = np.sqrt((lower * lower).sum(-1))
    size = (np.abs(precision) * sigma[..., None, :]).sum(-1)  # |C⁻¹| σ
    length = (np.abs(u) * sigma).sum(-1)
    sizes = 0.5 * np.abs(2 * log_det + LOG_2PI).sum(-1)
    keeps_factors = _keeps_factors(p, q) and not extra.any()
    if keeps_factors:
        rows = (np.abs(inverse) * sigma[..., None, :]).sum((-1, -2))
        sizes = sizes + length * np.sqrt((z * z).sum(-1)) + rows
    else:
        sizes = sizes + 0.5 * length * length + 0.5 * (size * sigma).sum(-1)
    if lower.shape[1] == lower.shape[2] == 1:
        reach = _reach(p, q, inverse)
        size = (np.abs(inverse).swapaxes(-1, -2) @ (np.abs(inverse) @ sigma[..., None]))[..., 0]
        sizes, length = sizes + length * reach, length + reach
    v = size * length[..., None]
    scale = size * np.sqrt(length * length + 1)[..., None]
    return Pairs(logits, sizes, u, v, precision, scale, True)


def _keeps_factors(p: Side, q: Side) -> bool:
    """Whether csdiv says that it does not multiply factors out: against points, and one covariance on both sides."""
    if p.points or q.points:
        return (q if p.points else p).factor is not None
    both = p.factor is not None and q.factor is not None
    return both and p.factor.shape[1] == q.factor.shape[1] == 1 and not (p.multiplied or q.multiplied)


def _reach(p: Side, q: Side, inverse: Array) -> Array:
    """The sum of both components' distances to the whitening's centre, in standard deviations, (B, N, M)."""
    seen = []
    for side in (p, q):
        usable = side.counts[..., None] & np.isfinite(side.means)
        seen.append(np.where(usable, side.means, np.nan).astype(np.float64))
    centres = []
    for own in seen:
        if own.size:
            known = np.where(np.isnan(own).all(1, keepdims=True), 0, own)
            centres += [np.nanmedian(known, 1), np.broadcast_to(np.nanmedian(known, (0, 1)), known[:, 0].shape)]
    total = np.zeros((p.means.shape[0], p.means.shape[1], q.means.shape[1]), LD)
    for side, axis in ((p, 2), (q, 1)):
        found = np.zeros(side.means.shape[:2], LD)
        for centre in centres:
            white = (inverse[:, 0, 0][:, None] @ (side.means - centre[:, None])[..., None])[..., 0]
            found = np.fmax(found, np.sqrt((white * white).sum(-1)))
        total = total + np.expand_dims(np.fmin(found, FAR * np.sqrt(LD(side.means.shape[-1]))), axis)
    return total


def _triangular(wide: Array) -> Array:
    """L with A Aᵀ = L Lᵀ for A (..., D, n), by Householder reflections of Aᵀ."""
    a = wide.swapaxes(-1, -2).copy()
    dim = a.shape[-1]
    for k in range(dim):
        v = a[..., k:, k].copy()
        norm = np.sqrt((v * v).sum(-1))
        v[..., 0] += np.where(v[..., 0] < 0, -norm, norm)
        square = (v * v).sum(-1)
        square = np.where(square == 0, 1, square)
        product = (v[..., None, :] @ a[..., k:, k:])[..., 0, :]
        a[..., k:, k:] -= v[..., None] * (2 * product / square[..., None])[..., None, :]
    lower = np.tril(a[..., :dim, :].swapaxes(-1, -2))
    return lower * np.where(np.diagonal(lower, axis1=-2, axis2=-1) < 0, -1, 1)[..., None, :]


def _cholesky(c: Array) -> Array:
    lower = np.zeros_like(c)
    for k in range(c.shape[-1]):
        column = c[..., k:, k] - (lower[..., k:, :k] @ lower[..., k, :k, None])[..., 0]
        lower[..., k:, k] = column / np.sqrt(column[..., :1])
    return lower


def _inverse(lower: Array) -> Array:
    """L⁻¹ by forward substitution, row by row."""
    inverse = np.zeros_like(lower)
    for k in range(lower.shape[-1]):
        row = -(lower[..., k, None, :k] @ inverse[..., :k, :])[..., 0, :]
        row[..., k] += 1
        inverse[..., k, :] = row / lower[..., k, k, None]
    return inverse


class Term(NamedTuple):
    """A log-sum-exp over the pairs: its value, its budget, and the shares r_ij of its pairs."""

    value: Array  # (B,), (B, N) or (B, N, M)
    shares: Array  # (B, N, M)
    errors: Array  # (B, N, M) of the shares
    band: Array  # in the shape of value
    sizes: Array  # S in the shape of value
    pairs: Pairs | None  # None: the value was given

    @property
    def relative(self) -> Array:
        """The errors of the shares relative to them, 0 where there is none."""
        there = self.shares > 0
        return np.where(there, self.errors / np.where(there, self.shares, 1), 0)


def reduced(pairs: Pairs, a: Array | None, b: Array | None, unit: float, weight_unit: float) -> Term:
    """Sums over i with the log weights ``a`` (B, N) and over j with ``b`` (B, M); None: not summed over.

    ``unit`` is 4 ε of the format that logits are computed in, ``weight_unit`` of that of the logarithms of weights.
    """
    logits, weights = pairs.logits, np.zeros_like(pairs.logits)
    with np.errstate(all="ignore"):
        for own, axis in ((a, 2), (b, 1)):
            if own is not None:
                weights = weights + np.expand_dims(np.where(own == np.inf, np.nan, own), axis)
        x = np.where(_any_absent(a, b, logits.shape), -np.inf, logits + weights)
        if a is not None:
            flat = x.reshape(x.shape[0], x.shape[1] * x.shape[2])
            value = log_sum_exp(flat)
            whole = value[:, None, None]
        elif b is not None:
            value = log_sum_exp(x)
            whole = value[..., None]
        else:
            value = whole = x
        known = np.isfinite(whole)
        shares = np.where(known, np.exp(x - np.where(known, whole, 0)), 0)
        if b is None:
            shares = np.ones_like(x)
        absolute = np.where(np.isfinite(weights), np.abs(weights), 0)
        sizes, of_weights = np.where(shares > 0, pairs.sizes + absolute, 0), np.where(shares > 0, absolute, 0)
        axes = (1, 2) if a is not None else (2,) if b is not None else ()
        total, total_of_weights = ((shares * s).sum(axes) if axes else s for s in (sizes, of_weights))
        lift = (slice(None),) * (3 - len(axes)) + (None,) * len(axes)
        errors = unit * (1 + pairs.sizes + absolute + total[lift]) + weight_unit * (absolute + total_of_weights[lift])
        if b is not None:  # what exp makes of it, and no share exceeds 1
            most = np.where(known & ~np.isnan(x), np.fmin(1, np.exp(x - whole + errors)), 0)
            errors = np.maximum(most - shares, shares * np.expm1(np.fmin(errors, 1))) + unit * most
        band = unit * np.maximum(1, total) + weight_unit * np.maximum(1, total_of_weights)
        if a is None and b is not None:  # a sum over nothing for a component that is NaN itself: −inf or NaN
            band = np.where(np.isnan(logits).all(-1) & (value == -np.inf), np.nan, band)
    return Term(value, shares, errors, band, total, pairs)


def _any_absent(a: Array | None, b: Array | None, shape: tuple[int, ...]) -> Array:
    absent = np.zeros(shape, bool)
    for own, axis in ((a, 2), (b, 1)):
        if own is not None:
            absent = absent | (np.expand_dims(own, axis) == -np.inf)
    return absent


def log_sum_exp(x: Array) -> Array:
    """Over the last dimension: NaN if there is one, else +inf if there is one, else the logarithm of the sum."""
    top = x.max(-1, initial=-np.inf)
    shift = np.where(np.isfinite(top), top, 0)
    return np.where(np.isfinite(top), np.log(np.exp(x - shift[..., None]).sum(-1)) + shift, top)


class Sums:
    """Gradients and their budgets by side and parameter, at full size: (B, K, D), (B, K, D) or (B, K, D, D), (B, K)."""

    def __init__(self, full: tuple[bool, ...], eps: tuple[float, ...]) -> None:
        """``full``: whether a side has full covariances; of others there are the diagonals. ``eps`` of a side's format,
        to which each term's gradient is rounded."""
        self.full, self.eps = full, eps
        self.found: dict[tuple[int, str], list[Array]] = {}

    def add(self, side: int, name: str, grad: Array, band: Array) -> None:
        band = band + self.eps[side] * np.abs(grad)
        old = self.found.get((side, name))
        self.found[side, name] = [grad, band] if old is None else [old[0] + grad, old[1] + band]

    def pull(
        self, term: Term, slopes: Array, errors: Array, sides: tuple[int, int], tiny: float
    ) -> tuple[Array, Array]:
        """Adds what upstream ``slopes`` with ``errors``, (B, N, M) or broadcast, give to means and covariances, (5)
        and (7); gives the logits' own gradient and its budget back."""
        shares = term.shares
        grad = np.where(shares == 0, 0, slopes * shares)
        size = np.abs(slopes) * np.ones_like(shares)
        band = size * term.errors + shares * errors + 2 * tiny * np.maximum(size, 1)
        self.spread(term.pairs, grad, np.where((shares == 0) & (term.errors == 0), 0, band), sides)
        return grad, band

    def spread(self, pairs: Pairs, grad: Array, band: Array, sides: tuple[int, int]) -> None:
        """Gradients of Σ grad · logits."""
        with np.errstate(all="ignore"):
            for (side, axis, sign), pair in zip(((sides[0], 2, -1), (sides[1], 1, 1)), ("left", "right"), strict=True):
                of_means = sign * _product(grad, pairs.of_means).sum(axis)
                self.add(side, "means", of_means, _product(band, pairs.of_means_size).sum(axis))
                spreads = _spreads(pairs, grad, band, pair)
                if pairs.full and not self.full[side]:
                    spreads = tuple(np.diagonal(t, axis1=-2, axis2=-1) for t in spreads)
                self.add(side, "spread", *spreads)


def _product(grad: Array, w: Array) -> Array:
    return np.where(grad[..., None] == 0, 0, grad[..., None] * w)


def _spreads(pairs: Pairs, grad: Array, band: Array, pair: str) -> tuple[Array, Array]:
    axis = 2 if pair == "left" else 1
    if not pairs.full:
        return _product(grad, pairs.of_spread).sum(axis), _product(band, pairs.of_spread_size).sum(axis)
    kept = "bnde" if pair == "left" else "bmde"
    u, precision = (np.where(np.isfinite(t), t, 0) for t in (pairs.of_means, pairs.of_spread))
    precision = np.broadcast_to(precision, (*grad.shape, *precision.shape[-2:]))
    outer = np.einsum(f"bnm,bnmd,bnme->{kept}", grad, u, u) - np.einsum(f"bnm,bnmde->{kept}", grad, precision)
    size = np.where(np.isfinite(pairs.of_spread_size), pairs.of_spread_size, 0)
    size = np.broadcast_to(size, (*grad.shape, size.shape[-1]))
    return 0.5 * outer, 0.5 * np.einsum(f"bnm,bnmd,bnme->{kept}", band, size, size)
