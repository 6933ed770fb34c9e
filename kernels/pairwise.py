"""The log density of every pair."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.device import LOG_2, TILE, item_of, place, tiles_of
from csdiv.kernels.pack import Problem
from csdiv.kernels.tile_densities import tile_densities
from csdiv.kernels.tile_logits import tile_columns, tile_rows


@triton.jit(do_not_specialize=["n", "m", "dim", "scale_stride", "offset_stride"])
def pairwise_forward_kernel(
    p_values, p_flags, q_values, q_flags, scales, offsets, p_index, q_index, densities,
    n, m, dim, scale_stride, offset_stride, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """densities[b, i, j] = log N(mu_i; nu_j, S_i + T_j); a program for a tile of pairs."""
    problem, row_tile, column_tile = place((n + BLOCK_N - 1) // BLOCK_N, tiles_of(m))
    p_item, q_item = item_of(p_index, problem), item_of(q_index, problem)
    first_row = row_tile * BLOCK_N
    row, row_flags = tile_rows(p_values, p_flags, p_item, n, first_row, dim, BLOCK_N)
    column, column_flags = tile_columns(q_values, q_flags, q_item, m, column_tile, dim)
    scales += problem * scale_stride
    logits, _ = tile_densities(row, row_flags, column, column_flags, scales, dim, FORM, BLOCK_N)
    offset = tl.load(offsets + problem * offset_stride).to(logits.dtype)
    i, j = tl.arange(0, BLOCK_N) + first_row, tl.arange(0, TILE) + column_tile * TILE
    at = (problem * n + i)[:, None] * m + j[None, :]
    tl.store(densities + at, logits * LOG_2 + offset, mask=(i < n)[:, None] & (j < m)[None, :])


def launch_pairwise_forward(problem: Problem, densities: Tensor) -> None:
    """Into ``densities`` (batch, n, m), in nats; weights count nothing."""
    p, q, scale, form = problem.p, problem.q, problem.scale, problem.form(exact=True)
    tile = problem.tile("rows", form)
    programs = problem.batch * -(-p.n // tile.block_n) * (q.padded // 128)
    if programs:
        sides = (p.values, p.flags, q.values, q.flags)
        arguments = (*sides, scale.scales, scale.offsets, problem.p_index, problem.q_index, densities)
        sizes = (p.n, q.n, problem.dim, scale.stride, scale.offset_stride)
        pairwise_forward_kernel[(programs,)](*arguments, *sizes, FORM=form, BLOCK_N=tile.block_n, **tile.options)
