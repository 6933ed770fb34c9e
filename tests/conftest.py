"""What every test starts from: NaN in unwritten memory, a number of threads, fixed seeds."""

import os
from collections.abc import Callable, Iterator

import emulation
import gpu
import interpreter
import ptx
import pytest
import torch
from hypothesis import settings

import csdiv._C as _C
from bench import static

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
"""Of torch in a test: threads of several processes wait for each other where there are more than processors."""

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    interpreter.install()  # first: the next line imports triton
    # torch.empty is filled with NaN in this mode, so that an output that was never written shows.
    torch.use_deterministic_algorithms(True)
    emulation.install()
    ptx.install()
    gpu.install()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def isa() -> Iterator[Callable[[str], None]]:
    """Sets an instruction set, or skips the test where the machine has not got it; the widest comes back afterwards."""
    widest = _C.cpu_isa()

    def use(name: str) -> None:
        try:
            _C.cpu_set_isa(name)
        except ValueError:
            pytest.skip(f"this machine does not have {name}")

    yield use
    _C.cpu_set_isa(widest)


@pytest.fixture(scope="session")
def kernels() -> list[static.Kernel]:
    """The machine code of the CUDA kernels, for tests that are skipped where there is none."""
    return static.read()
