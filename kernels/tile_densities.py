"""The densities of a tile of pairs in the form that the launch asks for, see configurations.py."""

import triton
import triton.language as tl

from csdiv.kernels.spherical import spherical_log2_densities
from csdiv.kernels.tied import tied_log2_densities, tied_rows_log2_densities
from csdiv.kernels.tile_logits import pairs_of, tile_log2_densities


@triton.jit
def tile_densities(
    row, row_flags, column, column_flags, scales, dim, FORM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """log2 of the densities, [BLOCK_N, TILE]; the second result, |x - y|^2 / c, is of the spherical forms."""
    if FORM == "diagonal":
        rows, columns = pairs_of(row, column, BLOCK_N)
        densities = tile_log2_densities(rows, row_flags, columns, column_flags, scales, dim, BLOCK_N)
        return densities, densities
    elif FORM == "tied" or FORM == "tied matrix":
        tied_matrix: tl.constexpr = FORM == "tied matrix"
        densities = tied_log2_densities(row, row_flags, column, column_flags, scales, dim, tied_matrix, BLOCK_N)
        return densities, densities
    elif FORM == "tied rows":
        densities = tied_rows_log2_densities(row, row_flags, column, column_flags, scales, dim, BLOCK_N)
        return densities, densities
    else:
        spherical_matrix: tl.constexpr = FORM == "spherical matrix"
        return spherical_log2_densities(row, row_flags, column, column_flags, scales, dim, spherical_matrix, BLOCK_N)
