"""ℓ_i of the rows of a pair: their parts added up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import OPTIONS
from csdiv.kernels.device import LOG_2, place
from csdiv.kernels.totals import log2_rows


@triton.jit(do_not_specialize=["n", "parts"])
def combine_rows_kernel(partials, row_lse, n, parts, BLOCK: tl.constexpr):
    problem, block, _ = place((n + BLOCK - 1) // BLOCK, 1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    row = log2_rows(partials + problem * parts * n, n, parts, i) * LOG_2
    tl.store(row_lse + problem * n + i, row.to(row_lse.dtype.element_ty), mask=i < n)


def launch_combine_rows(partials: Tensor, row_lse: Tensor) -> None:
    """Sums ``partials`` (batch, parts, n) over the parts, into ``row_lse`` (batch, n) in nats."""
    batch, parts, n = partials.shape
    if row_lse.numel():
        combine_rows_kernel[(batch * -(-n // 256),)](partials, row_lse, n, parts, BLOCK=256, **OPTIONS)
