"""A stand-in for a GPU: the backends "cuda" and "triton" on CPU tensors, so that what is for a GPU can be rehearsed.

``python tests/stand_in.py emulation ARGUMENTS`` is ``python ARGUMENTS`` with it; with "ptx" in the place of "emulation"
the shipped PTX runs, with the checks of its machine, if csdiv._C has any. With pytest, ``-p stand_in`` makes the
backends of gpu.py of them.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import emulation  # noqa: E402
import gpu  # noqa: E402
import interpreter  # noqa: E402
import ptx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from csdiv import backends  # noqa: E402


def install(kernels: str = emulation.NAME) -> None:
    """Registers them."""
    interpreter.install()
    emulation.install()
    ptx.install()
    if kernels == ptx.NAME and (reason := ptx.missing()):
        print(f"{kernels}: {reason}; the emulation in its place")
        kernels = emulation.NAME
    for name, inner in (("cuda", kernels), ("triton", interpreter.NAME)):
        if inner in backends.NAMES:
            backends.register(name, lambda inner=inner: _resolved(inner), full=backends.has_full(inner))  # type: ignore[misc]


def _resolved(name: str) -> Any:
    return backends.resolve(name, torch.device("cpu"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before conftest.py has its turn, which installs what there is."""

    def register() -> None:
        for inner, name in ((emulation.NAME, gpu.NAME), (interpreter.NAME, gpu.TRITON_NAME)):
            if inner in backends.NAMES:
                gpu.register(inner, name)

    gpu._copied = lambda value, device: value
    gpu.install = register


def main(kernels: str, *arguments: str) -> None:
    """Does what Python does with these arguments."""
    install(kernels)
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    how, *rest = arguments
    if how == "-c":
        exec(compile(rest[0], "<command>", "exec"), {"__name__": "__main__"})
    elif how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
