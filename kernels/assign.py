"""argmax_j logit_ij of rows: over the tiles of a program, its threads, and the parts of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import ROW_PROGRAMS, cut
from csdiv.kernels.device import TILE, item_of, part_begin, place, tiles_of
from csdiv.kernels.pack import Problem
from csdiv.kernels.tile_densities import tile_densities
from csdiv.kernels.tile_logits import tile_columns, tile_rows


@triton.jit
def lowest_of_largest(logits, indices):
    """Along axis 1; NaN is larger than any number, and the lowest index of equal ones wins."""
    nan = logits != logits
    top = tl.max(tl.where(nan, -float("inf"), logits), 1)
    nobody: tl.constexpr = 2**31 - 1
    first_nan = tl.min(tl.where(nan, indices, nobody), 1)
    first = tl.min(tl.where(logits == top[:, None], indices, nobody), 1)
    any_nan = first_nan != nobody
    return tl.where(any_nan, float("nan"), top), tl.where(any_nan, first_nan, first)


@triton.jit(do_not_specialize=["n", "m", "dim", "scale_stride", "parts"])
def assign_kernel(
    p_values, p_flags, q_values, q_flags, q_log2_weights, scales, p_index, q_index, best_logits, best_indices,
    n, m, dim, scale_stride, parts, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The largest logit of a part of the columns and its index, (b, part, i)."""
    problem, row_tile, part = place((n + BLOCK_N - 1) // BLOCK_N, parts)
    p_item, q_item = item_of(p_index, problem), item_of(q_index, problem)
    first_row = row_tile * BLOCK_N
    row, row_flags = tile_rows(p_values, p_flags, p_item, n, first_row, dim, BLOCK_N)
    scales += problem * scale_stride
    begin, end = part_begin(tiles_of(m), parts, part), part_begin(tiles_of(m), parts, part + 1)
    best = tl.full([BLOCK_N, TILE], -float("inf"), p_values.dtype.element_ty)
    index = tl.zeros([BLOCK_N, TILE], tl.int32) + (tl.arange(0, TILE) + begin * TILE)[None, :]
    for tile in range(begin, end):
        j = tl.arange(0, TILE) + tile * TILE
        column, column_flags = tile_columns(q_values, q_flags, q_item, m, tile, dim)
        logits, _ = tile_densities(row, row_flags, column, column_flags, scales, dim, FORM, BLOCK_N)
        logits += tl.load(q_log2_weights + q_item * tiles_of(m) * TILE + j)[None, :]
        better = (logits > best) | ((logits != logits) & (best == best))
        best = tl.where(better, logits, best)
        index = tl.where(better, j[None, :], index)
    best_of_row, index_of_row = lowest_of_largest(best, index)
    i = tl.arange(0, BLOCK_N) + first_row
    at = (problem * parts + part) * n + i
    tl.store(best_logits + at, best_of_row, mask=i < n)
    tl.store(best_indices + at, index_of_row.to(tl.int64), mask=i < n)


def launch_assign(problem: Problem, processors: int) -> Tensor:
    """The column of the largest logit of every row, (batch, n) int64."""
    p, q, form = problem.p, problem.q, problem.form(exact=True)
    tile = problem.tile("rows", form)
    row_tiles = problem.batch * -(-p.n // tile.block_n)
    parts = cut(processors * ROW_PROGRAMS, row_tiles, q.padded // 128)
    logits = p.values.new_empty(problem.batch, parts, p.n)
    indices = logits.new_empty(logits.shape, dtype=torch.int64)
    if row_tiles:
        sides = (p.values, p.flags, q.values, q.flags, q.log2_weights, problem.scale.scales)
        sizes = (p.n, q.n, problem.dim, problem.scale.stride, parts)
        arguments = (*sides, problem.p_index, problem.q_index, logits, indices, *sizes)
        assign_kernel[(row_tiles * parts,)](*arguments, FORM=form, BLOCK_N=tile.block_n, **tile.options)
    if parts == 1:
        return indices.squeeze(1)
    return indices.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
