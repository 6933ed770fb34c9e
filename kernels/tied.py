"""The pair term where all components of a side have one variance in a dimension.

log2 of the density, constants left out = -(log2(e) sum_d w (x - y)^2 + sum_d log2 c) / 2, w = 1/c, c = s + t
Tied on both sides, all pairs have one c. Tied rows, those of a column have one: a reciprocal for each column and
dimension, a logarithm for each column and group of dimensions.
"""

import triton
import triton.language as tl

from csdiv.kernels.device import GROUP, TILE, approximate_log2, padded_dim, reciprocal
from csdiv.kernels.pair import log2_density, split
from csdiv.kernels.squares import BLOCK_D, tied_sum, tile_squares
from csdiv.kernels.tile_logits import pairs_of, regular, tile_log2_densities


@triton.jit
def tied_log2_determinant(row, column, scales, dim):
    """sum_d log2 c of a regular tile, the references of the dimensions left out of each before it is rounded."""
    padded = padded_dim(dim)
    logarithms = tl.zeros([BLOCK_D], row.dtype.element_ty)
    for begin in range(0, padded, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        inside = d < padded
        exponent, mantissa = split(tied_sum(row, column, d, inside))
        unit_exponent, _ = split(tl.load(scales + padded + d, mask=inside, other=1.0))
        reference = tl.load(scales + d, mask=inside, other=0.0)
        logarithms += tl.log2(mantissa) + ((exponent - 2 * unit_exponent).to(mantissa.dtype) - reference)
    return tl.sum(logarithms, 0)


@triton.jit
def tied_log2_densities(
    row, row_flags, column, column_flags, scales, dim, MATRIX: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """As tile_log2_densities, which a tile that is not regular takes; ``row`` and ``column`` are the first ones."""
    if regular(row_flags, column_flags, dim):
        quadratic = tile_squares(row, column, 1.0, dim, True, MATRIX, BLOCK_N)
        log_determinant = tied_log2_determinant(row, column, scales, dim)
        densities = log2_density(quadratic, tl.zeros([BLOCK_N, TILE], quadratic.dtype) + log_determinant)
    else:
        rows, columns = pairs_of(row, column, BLOCK_N)
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N, False)
    return densities


@triton.jit
def tied_rows_log2_densities(row, row_flags, column, column_flags, scales, dim, BLOCK_N: tl.constexpr):
    """The same where only the rows are tied."""
    rows, columns = pairs_of(row, column, BLOCK_N)
    if regular(row_flags, column_flags, dim):
        padded = padded_dim(dim)
        quadratic = tl.zeros([BLOCK_N, TILE], row.dtype.element_ty)
        log_determinant = tl.zeros([TILE], row.dtype.element_ty)
        groups = padded // GROUP
        for first in range(0, groups, BLOCK_D // GROUP):
            block = tl.zeros([BLOCK_N, TILE], row.dtype.element_ty)
            for group in range(first, tl.minimum(first + BLOCK_D // GROUP, groups)):
                product = tl.full([TILE], 1.0, row.dtype.element_ty)
                for k in tl.static_range(GROUP):
                    at = group * (2 * GROUP * TILE) + k * TILE
                    c = tl.load(row + (at + GROUP * TILE)) + tl.load(columns + (at + GROUP * TILE))
                    delta = tl.load(rows + at)[:, None] - tl.load(columns + at)[None, :]
                    block += delta * reciprocal(c)[None, :] * delta
                    product *= c
                log_determinant += approximate_log2(product) - tl.load(scales + 2 * padded + group)
            quadratic += block
        densities = log2_density(quadratic, tl.zeros_like(quadratic) + log_determinant[None, :])
    else:
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N, False)
    return densities
