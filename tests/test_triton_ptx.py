"""The machine code of the Triton kernels, as PTX, run on the CPU: held to the contract, and without findings."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import triton_ptx
from contract import BATCHES, Case
from triton_marks import needs_triton

DIAGONAL, SPHERICAL, TIED = ("diagonal",) * 2, ("spherical",) * 2, ("tied diagonal",) * 2
PLAIN = Case("cs_divergence", n=17, m=31)
CASES = [
    PLAIN,
    PLAIN._replace(dtype=torch.float64, n=9, m=10, structures=DIAGONAL),
    *(PLAIN._replace(dim=dim, structures=structures) for structures in (SPHERICAL, TIED) for dim in (5, 17)),
    PLAIN._replace(structures=("tied diagonal", "diagonal")),
    PLAIN._replace(n=3, m=4, batch=BATCHES[2]),
    PLAIN._replace(entry="component_log_overlap", layout="misaligned", dim=33),
    PLAIN._replace(entry="pairwise_log_overlap", n=3, m=130, dim=4),
    PLAIN._replace(entry="log_overlap", scale="variances 1e±30"),
]
"""Every form of the pair term in float32, and every kernel, with all gradients; few variants, which take a second or so
to compile."""


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    with triton_ptx.process() as found:
        yield found


@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(pool: ProcessPoolExecutor, case: Case) -> None:
    pool.submit(triton_ptx.check, case).result()


@needs_triton
def test_assign(pool: ProcessPoolExecutor) -> None:
    """The lowest of equal components, and the largest of others."""
    means = torch.randn(5, 3)
    found = pool.submit(triton_ptx.assigned, means[[0, 3, 2]] + 0.01, means[[0, 1, 2, 1, 0, 3, 4, 1]], torch.ones(8, 3))
    assert found.result() == [0, 5, 2]


@needs_triton
@pytest.mark.parametrize(
    ("n", "written", "finding"),
    [
        (5, True, ""),
        (6, True, "read out of the bounds of global memory"),
        (5, False, "read of global memory that was never written"),
    ],
)
def test_the_machine_looks_at_memory(pool: ProcessPoolExecutor, n: int, written: bool, finding: str) -> None:
    assert finding in (found := pool.submit(triton_ptx.combine_rows, n, written).result())
    assert bool(found) == bool(finding)
