"""The pair term where all components of a side have one variance in a dimension, so that all pairs have one c = s + t.

log2 of the density, constants left out = -(log2(e) sum_d w (x - y)^2 + sum_d log2 c) / 2, w = 1/c
"""

import triton
import triton.language as tl

from csdiv.kernels.device import TILE, padded_dim
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
