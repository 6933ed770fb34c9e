"""Sums of squares sum_d w_d (x - y)^2 of a tile of pairs, where w is the same for all: 1, or 1/c of tied variances.

Direct: as it stands, 2 instructions for an element, with w 3.
Matrix: |x - m|^2 + |y - m|^2 - 2 (x - m)(y - m), each with w, the last by tensor cores; m is the mean of the tile's
rows. It errs by eps (|x - m|^2 + |y - m|^2) where the budget is 4 eps max(2 unit, |x - y|^2), with the unit c, or 1 of
squares with w (docs/kernels.md): tiles in which a pair does not fit take the direct form.

Tiles are regular ones, so that variances are scaled and c is no less than 2^-20. Those of tied sides are read from the
first row and the first column: pack.py gives the same ones to all, whether they count or not.
"""

import triton
import triton.language as tl

from csdiv.kernels.device import GROUP, TILE, padded_dim, reciprocal, rounded_product
from csdiv.kernels.tile_logits import pairs_of

BLOCK_D = tl.constexpr(32)  # dimensions of one product: summed up by the tensor cores, whose additions truncate
MATRIX_FITS = tl.constexpr(4.0)  # of norms against squares: the part of the angle of x - m and y - m is at most 3/4


@triton.jit
def place_of(d):
    """Where the means of dimension d are, from those of dimension 0; variances follow GROUP * TILE later."""
    return d // GROUP * (2 * GROUP * TILE) + d % GROUP * TILE


@triton.jit
def tied_sum(row, column, d, inside):
    """c in the dimensions d of tied variances, from the pointers to a component of each side; 1 where not inside."""
    at = place_of(d) + GROUP * TILE
    return tl.load(row + at, mask=inside, other=0.5) + tl.load(column + at, mask=inside, other=0.5)


@triton.jit
def direct_squares(row, column, dim, TIED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of all pairs, from the pointers to the first row and the first column."""
    rows, columns = pairs_of(row, column, BLOCK_N)
    squares = tl.zeros([BLOCK_N, TILE], row.dtype.element_ty)
    groups = padded_dim(dim) // GROUP
    for first in range(0, groups, BLOCK_D // GROUP):  # one sum of all dimensions would be less exact
        block = tl.zeros([BLOCK_N, TILE], row.dtype.element_ty)
        for group in range(first, tl.minimum(first + BLOCK_D // GROUP, groups)):
            for k in tl.static_range(GROUP):
                at = group * (2 * GROUP * TILE) + k * TILE
                delta = tl.load(rows + at)[:, None] - tl.load(columns + at)[None, :]
                if TIED:
                    c = tl.load(row + (at + GROUP * TILE)) + tl.load(column + (at + GROUP * TILE))
                    block += delta * reciprocal(c) * delta
                else:
                    block += delta * delta
        squares += block
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
def matrix_squares(row, column, dim, TIED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums, and |x - m|^2 + |y - m|^2 of all pairs. Columns come first in the product: it takes 64 or more."""
    row_norms, column_norms = tl.zeros([BLOCK_N], tl.float32), tl.zeros([TILE], tl.float32)
    products = tl.zeros([TILE, BLOCK_N], tl.float32)
    padded = padded_dim(dim)
    rows, columns = pairs_of(row, column, BLOCK_N)
    for begin in range(0, padded, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        at, inside = place_of(d), d < padded
        x = tl.load(rows[None, :] + at[:, None], mask=inside[:, None], other=0.0)
        y = tl.load(columns[:, None] + at[None, :], mask=inside[None, :], other=0.0)
        mean = tl.sum(x, 1) / BLOCK_N
        x, y = x - mean[:, None], y - mean[None, :]
        if TIED:
            w = reciprocal(tied_sum(row, column, d, inside))
            weighted_x, weighted_y = x * w[:, None], y * w[None, :]
        else:
            weighted_x, weighted_y = x, y
        row_norms += tl.sum(rounded_product(x, weighted_x), 0)
        column_norms += tl.sum(rounded_product(y, weighted_y), 1)
        products += product(y, weighted_x)
    norms = row_norms[:, None] + column_norms[None, :]
    return norms - 2 * tl.trans(products), norms


@triton.jit
def tile_squares(row, column, unit, dim, TIED: tl.constexpr, MATRIX: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums of all pairs, [BLOCK_N, TILE]."""
    if MATRIX:
        squares, norms = matrix_squares(row, column, dim, TIED, BLOCK_N)
        fits = norms <= tl.maximum(2 * unit, squares) * MATRIX_FITS
        if tl.min(tl.min(fits.to(tl.int32), 1), 0) == 0:
            squares = direct_squares(row, column, dim, TIED, BLOCK_N)
    else:
        squares = direct_squares(row, column, dim, TIED, BLOCK_N)
    return squares
