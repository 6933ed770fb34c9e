"""log2 sum_j 2^logit_ij of rows, online: over the tiles of a program, its threads, and the parts of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import PART_TILES, ROW_PROGRAMS, cut
from csdiv.kernels.device import TILE, approximate_exp2, item_of, part_begin, place, tiles_of
from csdiv.kernels.pack import Problem
from csdiv.kernels.tile_densities import tile_densities
from csdiv.kernels.tile_logits import tile_columns, tile_rows


@triton.jit
def largest(dtype: tl.constexpr):
    return 3.4028234663852886e38 if dtype == tl.float32 else 1.7976931348623157e308


@triton.jit
def lse_start(shape: tl.constexpr, dtype: tl.constexpr):
    """2^maximum total = 0. The maximum stays finite, so that infinities and NaN show in the total."""
    return tl.full(shape, -largest(dtype), dtype), tl.zeros(shape, dtype)


@triton.jit
def lse_update(maximum, total, logit):
    """Adds 2^logit."""
    top = tl.minimum(tl.maximum(maximum, logit), largest(logit.dtype))
    return top, total * approximate_exp2(maximum - top) + approximate_exp2(logit - top)


@triton.jit
def lse_merge(maximum, total, axis: tl.constexpr):
    """Adds up along an axis, in float64; its log2."""
    top = tl.max(maximum, axis)
    shift = approximate_exp2(maximum - tl.expand_dims(top, axis)).to(tl.float64)
    return top.to(tl.float64) + tl.log2(tl.sum(total.to(tl.float64) * shift, axis))


@triton.jit(do_not_specialize=["n", "m", "dim", "scale_stride", "parts"])
def row_sums_kernel(
    p_values, p_flags, q_values, q_flags, q_log2_weights, scales, p_index, q_index, partials,
    n, m, dim, scale_stride, parts, SELF: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partials[b, part, i] = log2 of the sum over a part of the columns, float64.

    SELF: of a mixture with itself; pairs above the diagonal stand for those below and count twice.
    """
    problem, row_tile, part = place((n + BLOCK_N - 1) // BLOCK_N, parts)
    p_item, q_item = item_of(p_index, problem), item_of(q_index, problem)

    first_row = row_tile * BLOCK_N
    i = tl.arange(0, BLOCK_N) + first_row
    row, row_flags = tile_rows(p_values, p_flags, p_item, n, first_row, dim, BLOCK_N)
    scales += problem * scale_stride
    maximum, total = lse_start([BLOCK_N, TILE], p_values.dtype.element_ty)
    first = first_row // TILE if SELF else 0
    tiles = tiles_of(m) - first
    for tile in range(first + part_begin(tiles, parts, part), first + part_begin(tiles, parts, part + 1)):
        j = tl.arange(0, TILE) + tile * TILE
        column, column_flags = tile_columns(q_values, q_flags, q_item, m, tile, dim)
        logits, _ = tile_densities(row, row_flags, column, column_flags, scales, dim, FORM, BLOCK_N)
        logits += tl.load(q_log2_weights + q_item * tiles_of(m) * TILE + j)[None, :]
        if SELF:
            above = j[None, :] - i[:, None]
            logits = tl.where(above < 0, -float("inf"), tl.where(above == 0, logits, logits + 1))
        maximum, total = lse_update(maximum, total, logits)
    tl.store(partials + (problem * parts + part) * n + i, lse_merge(maximum, total, 1), mask=i < n)


def launch_row_sums(problem: Problem, processors: int, *, self_overlap: bool = False) -> Tensor:
    """log2 of the sums of the rows over parts of their columns, (batch, parts, n) float64."""
    p, q = problem.p, problem.q
    form = problem.form()
    tile = problem.tile("rows", form)
    row_tiles = problem.batch * -(-p.n // tile.block_n)
    tiles = q.padded // 128
    parts = max(cut(processors * ROW_PROGRAMS, row_tiles, tiles), -(-tiles // PART_TILES))
    partials = p.values.new_empty(problem.batch, parts, p.n, dtype=torch.float64)
    if row_tiles:
        sides = (p.values, p.flags, q.values, q.flags, q.log2_weights)
        arguments = (*sides, problem.scale.scales, problem.p_index, problem.q_index, partials)
        sizes = (p.n, q.n, problem.dim, problem.scale.stride, parts)
        flags = {"SELF": self_overlap, "FORM": form, "BLOCK_N": tile.block_n}
        row_sums_kernel[(row_tiles * parts,)](*arguments, *sizes, **flags, **tile.options)
    return partials
