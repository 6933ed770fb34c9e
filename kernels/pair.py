"""The pair term in both of its forms: delta = mu - nu, c = s + t in every dimension.

log2 of the density, constants left out = -(log2(e) sum_d delta^2 / c + sum_d log2 c) / 2
Fast: groups of 4 dimensions share a reciprocal and a logarithm; for what pack.py certified.
Exact: one dimension at a time, right for every input.

Components are read where pack.py left them: ``rows`` and ``columns`` are pointers to one mean for each component.
"""

import triton
import triton.language as tl

from csdiv.kernels.device import GROUP, LOG2_E, TILE, approximate_log2, approximate_reciprocal, fma


@triton.jit
def delta_and_sum(rows, columns, k):
    """delta and c, [BLOCK_N, BLOCK_M], of dimension k of a group."""
    delta = tl.load(rows + k * TILE)[:, None] - tl.load(columns + k * TILE)[None, :]
    c = tl.load(rows + (GROUP + k) * TILE)[:, None] + tl.load(columns + (GROUP + k) * TILE)[None, :]
    return delta, c


@triton.jit
def add_fractions(numerator, denominator, other_numerator, other_denominator):
    """x1/c1 + x2/c2 = (x1 c2 + x2 c1) / (c1 c2)."""
    return numerator * other_denominator + other_numerator * denominator, denominator * other_denominator


@triton.jit
def add_group(quadratic, log_determinant, rows, columns, center):
    """Adds sum_d delta^2 / c and sum_d log2 c, less the group's center, over the 4 dimensions of a group."""
    delta0, c0 = delta_and_sum(rows, columns, 0)
    delta1, c1 = delta_and_sum(rows, columns, 1)
    delta2, c2 = delta_and_sum(rows, columns, 2)
    delta3, c3 = delta_and_sum(rows, columns, 3)
    numerator01, c01 = add_fractions(delta0 * delta0, c0, delta1 * delta1, c1)
    numerator23, c23 = add_fractions(delta2 * delta2, c2, delta3 * delta3, c3)
    numerator, denominator = add_fractions(numerator01, c01, numerator23, c23)
    quadratic += numerator * approximate_reciprocal(denominator)
    log_determinant += approximate_log2(denominator) - center
    return quadratic, log_determinant


@triton.jit
def exact_delta_and_sum(rows, columns, row_unit, column_unit):
    """delta and c of components that are scaled back by powers of two."""
    delta = (tl.load(rows) * row_unit)[:, None] - (tl.load(columns) * column_unit)[None, :]
    row_variance = tl.load(rows + GROUP * TILE) * row_unit * row_unit
    column_variance = tl.load(columns + GROUP * TILE) * column_unit * column_unit
    return delta, row_variance[:, None] + column_variance[None, :]


@triton.jit
def without_tiny(delta, c):
    """Where c is tiny, 2^2k of it and 2^k of delta: delta^2 / c stays, and c is normal. Also k."""
    k: tl.constexpr = 32 if c.dtype == tl.float32 else 256
    scale: tl.constexpr = 2.0**k
    tiny = c < 1 / scale / scale
    return tl.where(tiny, delta * scale, delta), tl.where(tiny, c * scale * scale, c), tl.where(tiny, k, 0)


@triton.jit
def split(c):
    """Exponent and mantissa, in [1, 2), of a positive normal number."""
    if c.dtype == tl.float32:
        bits = c.to(tl.int32, bitcast=True)
        return (bits >> 23) - 127, ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        bits = c.to(tl.int64, bitcast=True)
        return (bits >> 52) - 1023, ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def add_exact(quadratic, log_determinant, delta, c, reference):
    """The density is 0 where c or delta^2 is infinite; where c = 0 it is too, or infinite if all such delta are 0."""
    infinity = float("inf")
    zero, infinite = c == 0, c == infinity
    delta, c, k = without_tiny(delta, c)
    exponent, mantissa = split(c)
    log2_c = approximate_log2(mantissa) + ((exponent - 2 * k).to(c.dtype) - reference)
    log_determinant += tl.where(zero, -infinity, log2_c)
    distance = tl.abs(delta)  # NaN stays
    term = tl.where(infinite, distance + infinity, delta * approximate_reciprocal(c) * delta)
    quadratic += tl.where(zero & (delta != 0), distance * infinity, tl.where(zero, 0.0, term))
    return quadratic, log_determinant


@triton.jit
def log2_density(quadratic, log_determinant):
    high: tl.constexpr = 1.44269502162933349609 if quadratic.dtype == tl.float32 else LOG2_E  # a float, and the rest
    low: tl.constexpr = 1.92596299112661746887e-8 if quadratic.dtype == tl.float32 else 2.0355273740931033e-17
    density = -0.5 * fma(quadratic, high, fma(quadratic, low, log_determinant))
    return tl.where(quadratic == float("inf"), -float("inf"), density)


@triton.jit
def pair_gradient(delta, c):
    """u = delta / c and v = u^2 - 1/c: the share of a pair in the gradients to a mean and (twice) a variance."""
    reciprocal = approximate_reciprocal(c)
    u = delta * reciprocal
    return u, u * u - reciprocal


@triton.jit
def exact_pair_gradient(weight, delta, c):
    """The same times the pair's weight, where that is not zero."""
    delta, c, k = without_tiny(delta, c)
    reciprocal = approximate_reciprocal(c)
    u = delta * reciprocal
    mean, variance = weight * u, weight * reciprocal * (u * delta - 1)
    scale = tl.where(k == 0, 1.0, 2.0**32 if c.dtype == tl.float32 else 2.0**256).to(c.dtype)
    return tl.where(weight == 0, 0.0, mean * scale), tl.where(weight == 0, 0.0, variance * scale * scale)
