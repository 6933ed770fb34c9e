"""The pair term where each component has one variance, so that c = s + t is the same in every dimension.

log2 of the density, constants left out = -(log2(e) sum_d (x - y)^2 / c + D log2 c) / 2
Direct: the sum of squares as it stands, 2 instructions for an element.
Matrix: |x - m|^2 + |y - m|^2 - 2 (x - m)(y - m), the last by tensor cores; m is the mean of the tile's rows. It errs by
eps (|x - m|^2 + |y - m|^2) where the budget is 4 eps max(2 c, |x - y|^2) (docs/kernels.md): tiles in which a
pair does not fit take the direct form. A tile that is not regular takes the one of tile_logits.py.
"""

import triton
import triton.language as tl

from csdiv.kernels.device import FLAG_DIMS, GROUP, TILE, approximate_reciprocal, padded_dim
from csdiv.kernels.pair import log2_density, split
from csdiv.kernels.tile_logits import certified, tile_log2_densities

BLOCK_D = tl.constexpr(32)  # dimensions of one product: summed up by the tensor cores, whose additions truncate
MATRIX_FITS = tl.constexpr(4.0)  # of norms against squares: the part of the angle of x - m and y - m is at most 3/4


@triton.jit
def regular(row_flags, column_flags, dim):
    """Whether the fast form may be taken in every dimension."""
    irregular = 0
    for begin in range(0, dim, FLAG_DIMS):
        row_flag, column_flag = tl.load(row_flags + begin // FLAG_DIMS), tl.load(column_flags + begin // FLAG_DIMS)
        irregular += tl.where(certified(row_flag, column_flag), 0, 1)
    return irregular == 0


@triton.jit
def pair_sum(rows, columns):
    """c, [BLOCK_N, TILE]."""
    return tl.load(rows + GROUP * TILE)[:, None] + tl.load(columns + GROUP * TILE)[None, :]


@triton.jit
def direct_squares(rows, columns, dim, BLOCK_N: tl.constexpr):
    """|x - y|^2 of all pairs."""
    squares = tl.zeros([BLOCK_N, TILE], rows.dtype.element_ty)
    for group in range(padded_dim(dim) // GROUP):
        for k in tl.static_range(GROUP):
            at = group * (2 * GROUP * TILE) + k * TILE
            delta = tl.load(rows + at)[:, None] - tl.load(columns + at)[None, :]
            squares += delta * delta
    return squares


@triton.jit
def to_tf32(x):
    """Rounded to the 11 significant bits that a tensor core reads."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def product(x, y):
    """x y of float32 matrices by three products of tf32, the small ones first; 2^-22 is left out."""
    x_high, y_high = to_tf32(x), to_tf32(y)
    x_low, y_low = to_tf32(x - x_high), to_tf32(y - y_high)
    total = tl.dot(x_low, y_high, input_precision="tf32")
    total = tl.dot(x_high, y_low, total, input_precision="tf32")
    return tl.dot(x_high, y_high, total, input_precision="tf32")


@triton.jit
def matrix_squares(rows, columns, dim, BLOCK_N: tl.constexpr):
    """|x - y|^2 and |x - m|^2 + |y - m|^2 of all pairs. Columns come first in the product: it takes 64 or more."""
    row_norms, column_norms = tl.zeros([BLOCK_N], tl.float32), tl.zeros([TILE], tl.float32)
    products = tl.zeros([TILE, BLOCK_N], tl.float32)
    padded = padded_dim(dim)
    for begin in range(0, padded, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        at, inside = d // GROUP * (2 * GROUP * TILE) + d % GROUP * TILE, d < padded
        x = tl.load(rows[None, :] + at[:, None], mask=inside[:, None], other=0.0)
        y = tl.load(columns[:, None] + at[None, :], mask=inside[None, :], other=0.0)
        mean = tl.sum(x, 1) / BLOCK_N
        x, y = x - mean[:, None], y - mean[None, :]
        row_norms += tl.sum(x * x, 0)
        column_norms += tl.sum(y * y, 1)
        products += product(y, x)
    norms = row_norms[:, None] + column_norms[None, :]
    return norms - 2 * tl.trans(products), norms


@triton.jit
def tile_squares(rows, columns, c, dim, MATRIX: tl.constexpr, BLOCK_N: tl.constexpr):
    if MATRIX:
        squares, norms = matrix_squares(rows, columns, dim, BLOCK_N)
        fits = norms <= tl.maximum(2 * c, squares) * MATRIX_FITS
        if tl.min(tl.min(fits.to(tl.int32), 1), 0) == 0:
            squares = direct_squares(rows, columns, dim, BLOCK_N)
    else:
        squares = direct_squares(rows, columns, dim, BLOCK_N)
    return squares


@triton.jit
def spherical_log2_densities(
    rows, row_flags, columns, column_flags, scales, dim, MATRIX: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """As tile_log2_densities; also |x - y|^2 / c, where the tile is regular."""
    if regular(row_flags, column_flags, dim):
        c = pair_sum(rows, columns)
        quadratic = tile_squares(rows, columns, c, dim, MATRIX, BLOCK_N) * approximate_reciprocal(c)
        # Times D an approximate logarithm would err too much; the reference is the same in all dimensions.
        exponent, mantissa = split(c)
        unit_exponent, _ = split(tl.load(scales + padded_dim(dim)))
        log2_c = tl.log2(mantissa) + ((exponent - 2 * unit_exponent).to(c.dtype) - tl.load(scales))
        densities = log2_density(quadratic, dim * log2_c)
    else:
        quadratic = tl.zeros([BLOCK_N, TILE], rows.dtype.element_ty)
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N, False)
    return densities, quadratic


@triton.jit
def tile_densities(
    rows, row_flags, columns, column_flags, scales, dim, FORM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """In one of the forms "diagonal", "spherical" and "matrix"; the second result is of the last two."""
    if FORM == "diagonal":
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N)
        return densities, densities
    else:
        return spherical_log2_densities(rows, row_flags, columns, column_flags, scales, dim, FORM == "matrix", BLOCK_N)
