"""D_CS from the row sums of its three terms, which share one scale: what they leave out cancels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import OPTIONS
from csdiv.kernels.device import LOG_2, TILE, item_of, tiles_of
from csdiv.kernels.pack import Problem
from csdiv.kernels.totals import log2_total


@triton.jit(do_not_specialize=["offset_stride", "n", "m", "pq_parts", "pp_parts", "qq_parts"])
def cs_divergence_kernel(
    pq, pp, qq, p_log2_weights, q_log2_weights, p_index, q_index, offsets, divergences, row_lse, overlaps,
    offset_stride, n, m, pq_parts, pp_parts, qq_parts, BLOCK: tl.constexpr,
):  # fmt: skip
    """divergences[b] = (pp + qq) / 2 - pq and overlaps[b] = (pq, pp, qq); one program for a problem."""
    problem = tl.program_id(0).to(tl.int64)
    p_item, q_item = item_of(p_index, problem), item_of(q_index, problem)
    p_log2_weights += p_item * tiles_of(n) * TILE
    q_log2_weights += q_item * tiles_of(m) * TILE
    pq_total = (
        log2_total(pq + problem * pq_parts * n, p_log2_weights, row_lse + problem * n, n, pq_parts, BLOCK) * LOG_2
    )
    pp_total = log2_total(pp + p_item * pp_parts * n, p_log2_weights, None, n, pp_parts, BLOCK) * LOG_2
    qq_total = log2_total(qq + q_item * qq_parts * m, q_log2_weights, None, m, qq_parts, BLOCK) * LOG_2
    divergence = 0.5 * (pp_total + qq_total) - pq_total
    tl.store(divergences + problem, divergence.to(divergences.dtype.element_ty))
    offset = tl.load(offsets + problem * offset_stride)
    tl.store(overlaps + 3 * problem, pq_total + offset)
    tl.store(overlaps + 3 * problem + 1, pp_total + offset)
    tl.store(overlaps + 3 * problem + 2, qq_total + offset)


def launch_cs_divergence(
    problem: Problem, partials: tuple[Tensor, Tensor, Tensor], divergences: Tensor, row_lse: Tensor, overlaps: Tensor
) -> None:
    """``partials`` are the row sums of pq, and of pp and qq for each item; outputs (batch,), (batch, n), (batch, 3)."""
    if not problem.batch:
        return
    p, q, offsets = problem.p, problem.q, problem.scale.offsets
    tensors = (
        p.log2_weights,
        q.log2_weights,
        problem.p_index,
        problem.q_index,
        offsets,
        divergences,
        row_lse,
        overlaps,
    )
    counts = (problem.scale.offset_stride, p.n, q.n, *(t.shape[1] for t in partials))
    cs_divergence_kernel[(problem.batch,)](*partials, *tensors, *counts, BLOCK=1024, **OPTIONS)
