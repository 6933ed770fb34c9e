"""What every test starts from: NaN in unwritten memory, two threads, fixed seeds."""

import os

import emulation
import gpu
import interpreter
import pytest
import torch
from hypothesis import settings

from bench import static

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    interpreter.install()  # first: the next line imports triton
    # torch.empty is filled with NaN in this mode, so that an output that was never written shows.
    torch.use_deterministic_algorithms(True)
    emulation.install()
    gpu.install()


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def kernels() -> list[static.Kernel]:
    """The machine code of the CUDA kernels, for tests that are skipped where there is none."""
    return static.read()
