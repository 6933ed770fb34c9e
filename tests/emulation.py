"""The CUDA backend on the host, as one more backend for tests: "emulation" on CPU tensors; see native/emulation.h."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pybind11

from csdiv import backends

ROOT = Path(__file__).resolve().parents[1]
NAME = "emulation"
PROCESSORS = 2  # multiprocessors: so few that work is cut at the sizes of tests, in two ways or more


def build(folder: Path, *options: str) -> Path:
    """Builds the module in ``folder``, what has changed of it; its file."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    common = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    configure = ["cmake", "-GNinja", "-S", str(ROOT / "tests" / "native"), "-B", str(folder), *common]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    (module,) = folder.glob("csdiv_emulation.*.so")
    return module


def load(path: Path) -> ModuleType:
    """The built module."""
    spec = importlib.util.spec_from_file_location("csdiv_emulation", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(native: ModuleType) -> ModuleType:
    """Registers the backend: csdiv/backends/cuda.py once more, on the emulation's functions."""
    name = f"csdiv.backends.{NAME}"
    spec = importlib.util.spec_from_file_location(name, Path(backends.__file__).with_name("cuda.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.native = native
    module.stream = lambda device: 0
    module.capturing = lambda: False
    module.processors = lambda device: PROCESSORS
    sys.modules[name] = module
    backends.NAMES, backends.FULL = (*backends.NAMES, NAME), (*backends.FULL, NAME)
    backends._STATUS[NAME] = lambda: backends.BackendStatus(True, "")
    return module
