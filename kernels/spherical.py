"""The pair term where each component has one variance, so that c = s + t is the same in every dimension.

log2 of the density, constants left out = -(log2(e) sum_d (x - y)^2 / c + D log2 c) / 2
"""

import triton
import triton.language as tl

from csdiv.kernels.device import GROUP, TILE, approximate_reciprocal, padded_dim
from csdiv.kernels.pair import log2_density, split
from csdiv.kernels.squares import tile_squares
from csdiv.kernels.tile_logits import pairs_of, regular, tile_log2_densities


@triton.jit
def pair_sum(rows, columns):
    """c, [BLOCK_N, TILE]."""
    return tl.load(rows + GROUP * TILE)[:, None] + tl.load(columns + GROUP * TILE)[None, :]


@triton.jit
def spherical_log2_densities(
    row, row_flags, column, column_flags, scales, dim, MATRIX: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """As tile_log2_densities, which a tile that is not regular takes; also |x - y|^2 / c, where it is regular.

    ``row`` and ``column`` are the first ones.
    """
    rows, columns = pairs_of(row, column, BLOCK_N)
    if regular(row_flags, column_flags, dim):
        c = pair_sum(rows, columns)
        quadratic = tile_squares(row, column, c, dim, False, MATRIX, BLOCK_N) * approximate_reciprocal(c)
        # Times D an approximate logarithm would err too much; the reference is the same in all dimensions.
        exponent, mantissa = split(c)
        unit_exponent, _ = split(tl.load(scales + padded_dim(dim)))
        log2_c = tl.log2(mantissa) + ((exponent - 2 * unit_exponent).to(c.dtype) - tl.load(scales))
        densities = log2_density(quadratic, dim * log2_c)
    else:
        quadratic = tl.zeros([BLOCK_N, TILE], rows.dtype.element_ty)
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N, False)
    return densities, quadratic
