"""Sums of rows added up in a fixed order: their parts, and all rows of a mixture."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import OPTIONS
from csdiv.kernels.device import LOG_2, TILE, item_of, tiles_of
from csdiv.kernels.pack import Problem
from csdiv.kernels.row_sums import lse_merge, lse_start, lse_update


@triton.jit
def log2_rows(partials, n, parts, i):
    """log2 of the sums of rows i over their parts, float64; ``partials`` points to (parts, n)."""
    maximum, total = lse_start(i.shape, tl.float64)
    for _ in range(parts):
        maximum, total = lse_update(maximum, total, tl.load(partials + i, mask=i < n, other=-float("inf")))
        partials += n
    return maximum + tl.log2(total)


@triton.jit
def log2_total(partials, log2_weights, row_lse, n, parts, BLOCK: tl.constexpr):
    """log2 sum_i a_i 2^row_i, float64. ``row_lse``: where the rows\' logarithms go as well, in nats, or None."""
    maximum, total = lse_start([BLOCK], tl.float64)
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        row = log2_rows(partials, n, parts, i)
        if row_lse is not None:
            tl.store(row_lse + i, (row * LOG_2).to(row_lse.dtype.element_ty), mask=i < n)
        weight = tl.load(log2_weights + i, mask=i < n, other=-float("inf")).to(tl.float64)
        counts = weight != -float("inf")  # else nothing, whatever its row
        maximum, total = lse_update(maximum, total, tl.where(counts, weight + row, -float("inf")))
    return lse_merge(maximum, total, 0)


@triton.jit(do_not_specialize=["offset_stride", "n", "parts"])
def total_kernel(
    partials, log2_weights, index, offsets, values, row_lse, offset_stride, n, parts, BLOCK: tl.constexpr
):  # fmt: skip
    """values[b] = log sum_i a_i exp(row_i), in nats; one program for a problem."""
    problem = tl.program_id(0).to(tl.int64)
    if row_lse is not None:
        row_lse += problem * n
    partials += problem * parts * n
    log2_weights += item_of(index, problem) * tiles_of(n) * TILE
    value = log2_total(partials, log2_weights, row_lse, n, parts, BLOCK) * LOG_2
    tl.store(values + problem, value + tl.load(offsets + problem * offset_stride))


def launch_totals(problem: Problem, partials: Tensor, values: Tensor, row_lse: Tensor | None) -> None:
    """log V of every problem into ``values`` (batch,) float64, and ℓ_i without offset into ``row_lse`` (batch, n)."""
    if not problem.batch:
        return
    scale, parts = problem.scale, partials.shape[1]
    arguments = (partials, problem.p.log2_weights, problem.p_index, scale.offsets, values, row_lse)
    total_kernel[(problem.batch,)](*arguments, scale.offset_stride, problem.p.n, parts, BLOCK=1024, **OPTIONS)
