"""The Triton backend on CPU tensors, its kernels compiled for a GPU and their PTX run by native/ptx_machine.h.

Triton launches through a driver: the one here takes PTX for what a GPU loads, and the machine for that GPU. All before
it, what a launch specialises on and what is compiled when, is as on a GPU. How a kernel runs is settled where it is
decorated, and pytest's own process has it interpreted: so this is for processes of their own.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import csdiv
from bench.static_triton import SHARED_BYTES
from csdiv.operators import OPERATORS

NAME = "triton-ptx"
ROOT = Path(__file__).resolve().parents[1]
MAX_THREADS = 1024
Tensors = Sequence[Any]


class Driver:
    """What Triton takes for the driver of a GPU of this compute capability, such as 80."""

    def __init__(self, capability: int) -> None:
        self.capability, self.utils, self.launcher_cls = capability, self, Launcher

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES[self.capability]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        """Module, function, registers, spills and the most threads; the machine knows the kernel afterwards."""
        ptx, ptx_code = importlib.import_module("ptx"), importlib.import_module("ptx_code")
        known = f"{name} {hashlib.sha256(binary).hexdigest()[:16]}"
        if known not in ptx.machine().kernels:
            (kernel,) = ptx_code.kernels_of(binary.decode())
            ptx.machine().add(kernel, known)
        return None, known, 0, 0, MAX_THREADS


class Memory:
    """The tensors that kernels have seen in a call of the backend, kept so that no other takes their place."""

    def __init__(self) -> None:
        self.tensors = dict[int, Tensor]()

    def clear(self) -> None:
        self.tensors.clear()
        importlib.import_module("ptx").machine().clear_buffers()

    def add(self, t: Tensor, *, read_only: bool = False) -> None:
        """What torch has not written holds the one value that it fills memory with in tests."""
        ptx = importlib.import_module("ptx")
        begin, end = t.data_ptr(), t.data_ptr() + t.nbytes
        known = any(o.data_ptr() <= begin and end <= o.data_ptr() + o.nbytes for o in self.tensors.values())
        if t.numel() and not known:
            self.tensors[begin] = t
            ptx.machine().add_buffer(t, written=read_only or ptx._written(t), read_only=read_only)


memory = Memory()


class Launcher:
    """A compiled kernel as Triton launches it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types, self.metadata = list(source.signature.values()), metadata

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        """``rest``: metadata and hooks, four of them, and the arguments with the constants among them."""
        ptx = importlib.import_module("ptx")
        assert y == z == 1
        values: list[Any] = []
        for kind, value in zip(self.types, rest[4:], strict=True):
            if kind == "constexpr":
                continue
            if kind[0] == "*":
                memory.add(value)
                values.append(ctypes.c_uint64(value.data_ptr()))
            else:
                values.append({"i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind](value))
        scratch = len(ptx.machine().kernels[function].parameters) - len(values)  # that no kernel here asks for
        values += [ctypes.c_uint64(0)] * scratch
        ptx.machine().launch(function, x, 32 * self.metadata.num_warps, self.metadata.shared, values)


def _register(capability: int) -> None:
    backends, module = (importlib.import_module(f"csdiv.{name}") for name in ("backends", "backends.triton"))

    class OnMachine(importlib.import_module("interpreter").without_gpu(module.Triton)):
        def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> Any:
            with _checked(tensors):
                return super().forward(name, tensors, needs)

        def backward(
            self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
        ) -> Any:
            with _checked([grad, *tensors, *outputs]):
                return super().backward(name, grad, tensors, outputs, needs)

        def assign(self, name: str, tensors: Tensors) -> Any:
            with _checked(tensors):
                return super().assign(name, tensors)

    backends.register(NAME, OnMachine)


@contextlib.contextmanager
def _checked(tensors: Tensors) -> Iterator[None]:
    """A call of the backend, which must not write to ``tensors``; what the machine finds is an error of it."""
    memory.clear()
    for t in tensors:
        if t is not None:
            memory.add(t, read_only=True)
    try:
        yield
    finally:
        memory.clear()
    importlib.import_module("ptx").machine().check()


def install(capability: int = 80, package: Path | None = None) -> None:
    """Makes this process one where the backend "triton-ptx" runs, with the triton in ``package`` if that is given."""
    if package is not None:
        sys.path.insert(0, str(package))
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "triton-ptx")
    triton = importlib.import_module("triton")
    assert package is None or Path(triton.__file__).is_relative_to(package)
    compiler = importlib.import_module("triton.backends.nvidia.compiler").CUDABackend
    compiler.make_cubin = lambda self, source, *options: source.encode()
    importlib.import_module("triton.runtime").driver.set_active(Driver(capability))
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    _register(capability)


def package(version: str) -> Path:
    """A folder with this triton, for ``install``; the test is skipped where it cannot be had."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"triton {version} cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


@contextlib.contextmanager
def process(*arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """One that has had ``install(*arguments)``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=install, initargs=arguments) as pool:
        yield pool


def check(case: Any, order: str = "forward") -> None:
    """Holds the backend to the contract, in this process; threads and blocks take turns in an ``order``."""
    with importlib.import_module("ptx").machine().set(order):
        importlib.import_module("contract").check(case, NAME)


def assigned(points: Tensor, means: Tensor, variances: Tensor) -> list[int]:
    """The components that points are assigned to."""
    return csdiv.GaussianMixture(means, variances).assign(points, backend=NAME).tolist()


def combine_rows(n: int, written: bool) -> str:
    """What the machine says of a launch on ``n`` rows whose tensors have 5; "" if nothing."""
    ptx, module = importlib.import_module("ptx"), importlib.import_module("csdiv.kernels.overlap_lse_forward")
    partials = torch.zeros(1, 1, 5, dtype=torch.float64) if written else torch.empty(1, 1, 5, dtype=torch.float64)
    try:
        with _checked([]):
            module.combine_rows_kernel[(1,)](partials, torch.empty(1, 5), n, 1, BLOCK=256, **module.OPTIONS)
    except ptx.Finding as finding:
        return str(finding)
    return ""


class Counter(TorchDispatchMode):
    """Counts what a GPU would be given to run: operations of torch that are not mere views, and Triton's kernels."""

    VIEWS = re.compile(
        r"aten\.(_unsafe_view|alias|as_strided|detach|empty\w*|expand|narrow|new_empty|permute|reshape|select|slice|split|"
        r"squeeze|t|transpose|unbind|unsqueeze|view)\."
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if not self.VIEWS.match(str(function)):
            self.counts[str(function)] += 1
        return function(*arguments, **named or {})

    def __enter__(self) -> Any:
        jit = importlib.import_module("triton").JITFunction
        self._patch = mock.patch.object(jit, "run", lambda kernel, *a, **k: self.counts.update([kernel.__name__]))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)


def launches(name: str, shapes: Sequence[tuple[int, ...]], *, backward: bool = False) -> dict[str, int]:
    """What an operator with all gradients launches on tensors of these shapes, None for weights that are not given;
    ``backward``: what its backward pass does."""
    backend = importlib.import_module("csdiv.backends").resolve(NAME, torch.device("cpu"))
    tensors = [None if shape is None else torch.ones(shape) for shape in shapes]
    needs = [t is not None for t in tensors]
    with Counter() as counter:
        outputs, _ = backend.forward(name, tensors, [need and not backward for need in needs])
        if backward:
            grad, saved = torch.ones_like(outputs[0]), [outputs[k] for k in OPERATORS[name].saved]
            counter.counts.clear()
            backend.backward(name, grad, tensors, saved, needs)
    return dict(counter.counts)


@contextlib.contextmanager
def variants() -> Iterator[set[tuple[str, str]]]:
    """The kernels that would be compiled, names and what Triton tells its variants by; none is, nor runs."""
    function, found = importlib.import_module("triton").JITFunction, set[tuple[str, str]]()

    def record(kernel: Any, key: Any, *rest: Any) -> None:
        found.add((kernel.__name__, str(key)))

    with mock.patch.object(function, "_do_compile", record):
        yield found
