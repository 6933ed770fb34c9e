"""Small kernels around helpers of csdiv.kernels, for tests; not interpreted unless a test says so."""

import triton.language as tl

from csdiv.kernels.tile_logits import pairs_of, tile_columns


def tile_offsets(values, flags, value_offsets, flag_offset, item, n, tile, dim):
    """Where a tile's components and its flags are, counted from the first ones, in bytes."""
    column, column_flags = tile_columns(values, flags, item, n, tile, dim)
    _, columns = pairs_of(column, column, 16)
    tl.store(value_offsets + tl.arange(0, 128), columns.to(tl.int64) - values.to(tl.int64))
    tl.store(flag_offset, column_flags.to(tl.int64) - flags.to(tl.int64))
