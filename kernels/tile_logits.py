"""The logits of a tile of pairs: a program has BLOCK_N rows, and each of its threads one of the TILE columns."""

import triton
import triton.language as tl

from csdiv.kernels.device import FLAG_DIMS, GROUP, TILE, padded_dim, tiles_of
from csdiv.kernels.pair import add_exact, add_group, exact_delta_and_sum, log2_density


@triton.jit
def tile_components(values, flags, item, n, tile, in_tile, dim):
    """Pointers to the first mean of a component of a tile, others follow it, and to the flags of the tile."""
    tile = item.to(tl.int64) * tiles_of(n) + tile
    return values + tile * (2 * TILE) * padded_dim(dim) + in_tile, flags + tile * ((dim + FLAG_DIMS - 1) // FLAG_DIMS)


@triton.jit
def tile_rows(values, flags, item, n, first_row, dim, BLOCK_N: tl.constexpr):
    """Of the first of BLOCK_N components; tiles are a multiple of these."""
    in_tile = tl.multiple_of(first_row % TILE, BLOCK_N)
    return tile_components(values, flags, item, n, first_row // TILE, in_tile, dim)


@triton.jit
def tile_columns(values, flags, item, n, tile, dim):
    """Of the first component of a tile."""
    return tile_components(values, flags, item, n, tile, 0, dim)


@triton.jit
def pairs_of(row, column, BLOCK_N: tl.constexpr):
    """Pointers to the first mean of each row and each column."""
    return row + tl.arange(0, BLOCK_N), column + tl.arange(0, TILE)


@triton.jit
def certified(row_flag, column_flag):
    """Whether the fast form may be taken: both regular (1), and one of them wide (2)."""
    return ((row_flag & column_flag & 1) != 0) & (((row_flag | column_flag) & 2) != 0)


@triton.jit
def regular(row_flags, column_flags, dim):
    """Whether the fast form may be taken in every dimension."""
    irregular = 0
    for begin in range(0, dim, FLAG_DIMS):
        row_flag, column_flag = tl.load(row_flags + begin // FLAG_DIMS), tl.load(column_flags + begin // FLAG_DIMS)
        irregular += tl.where(certified(row_flag, column_flag), 0, 1)
    return irregular == 0


@triton.jit
def inverse_unit(flag, unit):
    """What takes a tile back to the caller's units, a power of two; one that is not regular was left as it is.

    Taken from the bits: a division may be off by 2 ulp.
    """
    if unit.dtype == tl.float32:
        inverse = ((254 << 23) - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        inverse = ((2046 << 52) - unit.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)
    return tl.where(flag == 0, 1.0, inverse)


@triton.jit
def tile_log2_densities(
    rows, row_flags, columns, column_flags, scales, dim, BLOCK_N: tl.constexpr, FAST: tl.constexpr = True
):  # fmt: skip
    """log2 of the densities of all pairs, [BLOCK_N, TILE], the references of the dimensions left out.

    ``rows`` and ``columns`` are pointers to the first mean of each component, ``scales`` to the references, units and
    centers of the problem. FAST: False takes the exact form alone, with fewer registers.
    """
    padded = padded_dim(dim)
    quadratic = tl.zeros([BLOCK_N, TILE], rows.dtype.element_ty)
    log_determinant = tl.zeros([BLOCK_N, TILE], rows.dtype.element_ty)
    for begin in range(0, dim, FLAG_DIMS):
        row_flag, column_flag = tl.load(row_flags + begin // FLAG_DIMS), tl.load(column_flags + begin // FLAG_DIMS)
        first, last = begin // GROUP, tl.minimum(begin + FLAG_DIMS, padded) // GROUP
        if FAST & certified(row_flag, column_flag):
            for group in range(first, last):
                at = group * (2 * GROUP * TILE)
                center = tl.load(scales + 2 * padded + group)
                quadratic, log_determinant = add_group(quadratic, log_determinant, rows + at, columns + at, center)
        else:
            for group in range(first, last):
                for k in range(GROUP):
                    d, at = group * GROUP + k, group * (2 * GROUP * TILE) + k * TILE
                    unit = tl.load(scales + padded + d)
                    row_unit, column_unit = inverse_unit(row_flag, unit), inverse_unit(column_flag, unit)
                    delta, c = exact_delta_and_sum(rows + at, columns + at, row_unit, column_unit)
                    quadratic, log_determinant = add_exact(quadratic, log_determinant, delta, c, tl.load(scales + d))
    return log2_density(quadratic, log_determinant)
