"""The machine code of the Triton kernels, as PTX, run on the CPU: held to the contract, and without findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import triton_ptx
from contract import BATCHES, Case
from test_triton_contract import AROUND_TILES, CHOSEN, OF_SPHERICAL, OF_TIED, OF_TIED_ROWS
from triton_marks import needs_triton

SPHERICAL, TIED = ("spherical",) * 2, ("tied diagonal",) * 2
PLAIN, TOTAL = Case("cs_divergence", n=17, m=31), Case("log_overlap", n=17, m=31)
CASES = [
    PLAIN,
    TOTAL._replace(dtype=torch.float64, n=9, m=10),
    *(PLAIN._replace(structures=structures) for structures in (SPHERICAL, TIED)),
    *(TOTAL._replace(dim=17, structures=structures) for structures in (SPHERICAL, TIED)),
    TOTAL._replace(structures=("tied diagonal", "diagonal")),
    TOTAL._replace(n=3, m=4, batch=BATCHES[2]),
    TOTAL._replace(dim=3, scale="variances 1e±30"),
    PLAIN._replace(entry="component_log_overlap", layout="misaligned", dim=33),
    PLAIN._replace(entry="pairwise_log_overlap", n=3, m=130, dim=4),
]
"""Every form of the pair term in float32, and every kernel, with all gradients, in few variants: each takes a second or
so to compile."""


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


# Slow: other orders of threads and blocks, every case that the interpreter runs, and other compilers and GPUs


def failures(pool: ProcessPoolExecutor, cases: Sequence[Case], order: str = "forward") -> dict[str, str]:
    """The cases that do not hold, with the errors."""
    running = {str(case): pool.submit(triton_ptx.check, case, order) for case in cases}
    return {name: str(error) for name, future in running.items() if (error := future.exception())}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_contract_in_any_order_of_threads(pool: ProcessPoolExecutor, order: str) -> None:
    assert failures(pool, CASES, order) == {}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("cases", [CHOSEN, AROUND_TILES, OF_SPHERICAL, OF_TIED, OF_TIED_ROWS])
def test_whole_contract(pool: ProcessPoolExecutor, cases: list[Case]) -> None:
    assert failures(pool, cases) == {}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("version", [None, "3.6.0", "3.8.0"])
@pytest.mark.parametrize("capability", [80, 90])
def test_contract_of_other_compilers(version: str | None, capability: int) -> None:
    """Of the installed Triton and of other versions, where they can be had; 9.0 has matrix products of its own."""
    package = None if version is None else triton_ptx.package(version)
    with triton_ptx.process(capability, package) as pool:
        assert failures(pool, CASES) == {}
