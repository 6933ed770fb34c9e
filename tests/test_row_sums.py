"""How the forward pass of the CUDA kernels is cut and launched, and what its memory accesses cost; on the host."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable
from typing import Any

import emulation
import ptx
import pytest
import torch

import csdiv
from csdiv import testing

PROCESSORS, RESIDENT = 132, {4: 2, 8: 1}
"""Of an H200, and blocks of each itemsize on a multiprocessor at a time."""


def pair_tiles(n: int, m: int, itemsize: int) -> int:
    """Tiles of 64 x 64 pairs, or 64 x 32 in float64, in p against q and in the upper triangles of both."""
    width = 256 // itemsize
    rows = [math.ceil(size / 64) for size in (n, m)]
    columns = [math.ceil(size / width) for size in (n, m)]
    triangles = sum(columns[side] - row * 64 // width for side in (0, 1) for row in range(rows[side]))
    return rows[0] * columns[1] + triangles


def longest_way(blocks: list[int], slots: int) -> int:
    """Tiles of the slot that ends last, if the next block goes where one ends first."""
    ends = [0] * slots
    for block in blocks:
        heapq.heapreplace(ends, ends[0] + block)
    return max(ends)


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize(
    ("batch", "n", "m"),
    [
        (1, 128, 500),
        (1, 1024, 1024),
        (1, 2048, 2048),
        (1, 4096, 4096),
        (1, 256, 10_000),
        (1, 10_000, 256),
        (1, 8192, 8192),
        (1, 1024, 100_000),
        (1, 1, 1_000_000),
        (1000, 16, 16),
        (3, 700, 333),
    ],
)
def test_row_sums_are_cut_evenly(batch: int, n: int, m: int, itemsize: int) -> None:
    """Every tile once; every multiprocessor has some if there are enough, and few wait for the last."""
    blocks = emulation.backend().native.row_blocks(itemsize, batch, n, m, PROCESSORS)
    tiles, slots = batch * pair_tiles(n, m, itemsize), PROCESSORS * RESIDENT[itemsize]
    assert sum(blocks) == tiles
    assert min(blocks) > 0
    assert len(blocks) >= min(tiles, slots)
    best = math.ceil(tiles / slots)
    assert best / longest_way(blocks, slots) >= 0.85
    assert len(blocks) <= max(tiles, 36 * PROCESSORS) + 3 * batch * (n + m) // 64


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("processors", [1, 7, 132])
def test_any_number_of_tiles_is_cut_in_blocks_that_are_not_empty(itemsize: int, processors: int) -> None:
    row_blocks = emulation.backend().native.row_blocks
    for batch, n, m in [(1, 1, 1), (2, 64, 65), (1, 65, 4000), (3, 1000, 129), (1, 97, 5121), (1, 20_001, 33)]:
        blocks = row_blocks(itemsize, batch, n, m, processors)
        assert sum(blocks) == batch * pair_tiles(n, m, itemsize)
        assert min(blocks) > 0


def launches(call: Callable[..., torch.Tensor], *arguments: Any, **options: Any) -> int:
    """Of kernels, forward and backward where gradients are wanted."""
    native = emulation.backend().native
    before = native.launches()
    value = call(*arguments, backend=emulation.NAME, **options)
    if value.requires_grad:
        value.sum().backward()
    return int(native.launches() - before)


def test_a_call_has_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the smallest size of an autoencoder: packing, row sums, totals; two more for gradients of scalars."""
    monkeypatch.setattr(emulation.backend(), "processors", lambda device: PROCESSORS)
    p, q = (testing.random_mixture(size, 40) for size in (128, 500))
    for entry in (csdiv.cs_divergence, csdiv.log_overlap, csdiv.component_log_overlap):
        assert launches(entry, p, q) == 3
    assert launches(csdiv.log_overlap, q) == 3
    codes = (p.means, p.variances.log(), q)
    assert launches(csdiv.cs_regularizer, *codes) == 5
    assert launches(csdiv.cs_regularizer, *codes, prior_self_overlap=csdiv.log_overlap(q)) == 4
    wanted = [side.map(lambda t: t.clone().requires_grad_()) for side in (p, q)]
    assert launches(csdiv.cs_divergence, *wanted) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "dim"), [(2100, 3, 2), (1, 1500, 3), (130, 700, 5)])
def test_any_number_of_multiprocessors_gives_the_same_values(
    n: int, m: int, dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in one part, in some, and in so many that a warp adds up each; totals in one step and in two."""
    g = torch.Generator().manual_seed(n)
    p, q = (testing.random_mixture(size, dim, dtype=dtype, generator=g) for size in (n, m))
    exact = [side.to(torch.float64) for side in (p, q)]
    for processors in (1, 2, PROCESSORS):
        monkeypatch.setattr(
            emulation.backend(), "processors", functools.partial(lambda count, device: count, processors)
        )
        for entry in (csdiv.cs_divergence, csdiv.component_log_overlap, csdiv.log_overlap):
            value, expected = entry(p, q, backend="emulation"), entry(*exact, backend="cpu")
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=3e-5 if dtype == torch.float32 else 1e-12)


def test_totals_of_batches_that_share_a_side() -> None:
    """Rows of a side that problems share are added up once where they are many."""
    g = torch.Generator().manual_seed(0)
    for p_batch, q_batch in (((), (3,)), ((2, 1), (1, 2))):
        p, q = (
            testing.random_mixture(size, 2, batch_shape=batch, dtype=torch.float64, generator=g)
            for size, batch in ((1540, p_batch), (3, q_batch))
        )
        values = [csdiv.cs_divergence(p, q, backend=backend) for backend in ("emulation", "cpu")]
        torch.testing.assert_close(*values, rtol=0, atol=1e-12)


with_ptx = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())


def sectors(kernel: str, itemsize: int) -> tuple[int, int]:
    """Of 32 bytes that a kernel's accesses to global memory took, and the least that have these bytes."""
    name = next(name for name in ptx.machine().kernels if f"{kernel}I{'f' if itemsize == 4 else 'd'}E" in name)
    counts = ptx.machine().counts(name)
    return sum(line.sectors for line in counts), sum(line.ideal_sectors for line in counts)


@with_ptx
@pytest.mark.parametrize(("dim", "most"), [(64, 1.02), (40, 1.1), (5, 1.2)])
def test_packing_reads_neighbours(dim: int, most: float) -> None:
    p, q = (testing.random_mixture(size, dim) for size in (1000, 130))
    ptx.backend()
    for kernel in ptx.machine().kernels:
        ptx.machine().counts(kernel)
    csdiv.component_log_overlap(p, q, backend="ptx")
    taken, least = sectors("pack_kernel", 4)
    assert least > 0
    assert taken <= most * least


@with_ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_read_of_a_scale_without_rows(dtype: torch.dtype) -> None:
    """A batch of no mixtures against one: the scale is that of the one."""
    p, q = (testing.random_mixture(5, 3, batch_shape=batch, dtype=dtype) for batch in ((0,), ()))
    assert csdiv.component_log_overlap(p, q, backend="ptx").shape == (0, 5)
    assert csdiv.cs_regularizer(p.means[:, 0], p.variances[:, 0], q, backend="ptx").shape == (0,)
