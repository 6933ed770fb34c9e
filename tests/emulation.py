"""The CUDA backend on the host, as one more backend for tests: "emulation" on CPU tensors; see native/emulation.h."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from csdiv import backends
from csdiv.backends.cuda import Cuda

ROOT = Path(__file__).resolve().parents[1]
NAME = "emulation"
PROCESSORS = 2  # multiprocessors: so few that work is cut at the sizes of tests, in two ways or more


def build(folder: Path, *options: str) -> Path:
    """Builds the module in ``folder``, what has changed of it; its file. One process at a time builds there."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    common = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    configure = ["cmake", "-GNinja", "-S", str(ROOT / "tests" / "native"), "-B", str(folder), *common]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ["cmake", "--build", str(folder)]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stdout + done.stderr
    (module,) = folder.glob("csdiv_emulation.*.so")
    return module


def load(path: Path, package: str = "") -> ModuleType:
    """The built module; in another ``package`` for each copy of it, or pybind11 gives the first."""
    spec = importlib.util.spec_from_file_location(f"{package}csdiv_emulation", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulation(Cuda):
    """csdiv/backends/cuda.py on the emulation's functions."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native

    def stream(self, device: torch.device) -> int:
        return 0

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def processors(self, device: torch.device) -> int:
        return PROCESSORS


def install(native: ModuleType | None = None) -> None:
    """Registers the backend; the module is built when it is first needed, unless it is given."""
    backends.register(NAME, lambda: Emulation(native or load(build(ROOT / "build" / "emulation"))), full=True)


def backend() -> Emulation:
    """The one that is registered."""
    found = backends.resolve(NAME, torch.device("cpu"))
    assert isinstance(found, Emulation)
    return found
