"""The PTX of the built CUDA kernels in the place of the emulation's kernels, as one more backend for tests: "ptx".

The host code is the emulation's, so is what the kernels are given; what runs is the PTX that csdiv._C was built with,
on native/ptx_machine.h. A finding of the machine is an error of the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import emulation
import ptx_code
import torch
from torch import Tensor

from bench import static
from csdiv import _C, backends
from csdiv.backends.arrays import Call, Side, flattened

NAME = "ptx"
ORDERS = ("forward", "reverse", "random")
FOLDER = emulation.ROOT / "build" / "emulation"
_INT, _LONG = ctypes.c_int32, ctypes.c_uint64


class Line(NamedTuple):
    """What the machine counted of one instruction since counts were cleared: see Counts in native/ptx_machine.h."""

    line: int
    executed: int
    lanes: int
    cycles: int
    ideal_cycles: int
    sectors: int
    ideal_sectors: int


class Finding(AssertionError):
    """Something that is wrong with a kernel, whatever its results."""


def _array(kind: Any, values: Sequence[int]) -> Any:
    return (kind * max(len(values), 1))(*values)


class Machine:
    """native/ptx_machine.cpp; there is one in a process."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name in ("add_kernel", "launch", "findings", "counts"):
            getattr(self.library, f"ptx_{name}").restype = ctypes.c_char_p
        for name in ("skip", "executed"):
            getattr(self.library, f"ptx_{name}").restype = _LONG
        self.kernels: dict[str, ptx_code.Kernel] = {}

    def add(self, kernel: ptx_code.Kernel, name: str) -> None:
        """Makes a kernel known as ``name``.

        Raises:
            ValueError: it has an opcode that the machine has not.
        """
        self.kernels[name] = kernel
        names = sorted({row.name for row in kernel.rows})
        rows, operands, widths = list[int](), list[int](), list[int]()
        for row in kernel.rows:
            rows += (names.index(row.name), row.guard, row.negated, row.line, len(operands), len(row.operands))
            operands += (value for value, _ in row.operands)
            widths += (width for _, width in row.operands)
        parameters = [x for parameter in kernel.parameters for x in parameter]
        error = self.library.ptx_add_kernel(
            name.encode(),
            (ctypes.c_char_p * len(names))(*(n.encode() for n in names)),
            _array(_INT, rows),
            len(kernel.rows),
            _array(_INT, operands),
            _array(_INT, widths),
            len(operands),
            _array(_INT, parameters),
            len(kernel.parameters),
            *(_array(kind, [c[k] for c in kernel.constants]) for k, kind in enumerate((_INT, _INT, _LONG))),
            len(kernel.constants),
            _LONG(kernel.file_bytes),
            _LONG(kernel.shared_bytes),
            kernel.max_threads,
        )
        if error:
            raise ValueError(f"{name}: {error.decode()}")

    def add_buffer(self, t: Tensor, *, written: bool, read_only: bool) -> None:
        """Memory that kernels may access, from a tensor's first to its last element."""
        if t.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            name = f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            self.library.ptx_add_buffer(
                _LONG(t.data_ptr()), _LONG(extent * t.itemsize), int(written), int(read_only), name.encode()
            )

    def clear_buffers(self) -> None:
        self.library.ptx_clear_buffers()

    def launch(self, name: str, blocks: int, threads: int, shared_bytes: int, values: Sequence[Any]) -> None:
        """Runs a kernel; ``values`` are those of ctypes.

        Raises:
            Finding: the kernel cannot go on.
        """
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = _array(ctypes.c_uint32, [ctypes.sizeof(v) for v in values])
        arguments = (ctypes.c_int64(blocks), threads, _LONG(shared_bytes), pointers, sizes, len(values))
        if error := self.library.ptx_launch(name.encode(), *arguments):
            raise Finding(error.decode())

    def findings(self) -> list[str]:
        """What was found since they were last asked for."""
        return self.library.ptx_findings().decode().splitlines()

    def check(self) -> None:
        """
        Raises:
            Finding: there are findings.
        """
        if found := self.findings():
            raise Finding("\n".join(found))

    @contextlib.contextmanager
    def set(self, order: str = "forward", *, exact: bool = False) -> Iterator[None]:
        """The order of warps and blocks, and whether approximate functions are rounded correctly, for a while."""
        self.library.ptx_set(ORDERS.index(order), int(exact), 1)
        yield
        self.library.ptx_set(0, 0, 1)

    def skip(self, name: str, line: int) -> int:
        """Leaves out the barrier of a kernel at a line, from now on; how often the one before was left out."""
        return int(self.library.ptx_skip(name.encode(), line))

    def executed(self) -> Counter[str]:
        """Instructions of warps, by the kernels that ran."""
        return +Counter({name: self.library.ptx_executed(name.encode()) for name in self.kernels})

    def counts(self, name: str) -> list[Line]:
        """What a kernel's instructions did."""
        text = self.library.ptx_counts(name.encode()).decode()
        return [Line(*map(int, line.split())) for line in text.splitlines()]

    def clear_counts(self) -> None:
        """Of all kernels."""
        self.library.ptx_clear_counts()


@functools.cache
def machine() -> Machine:
    """The one of this process; it is built with the emulation."""
    return Machine(emulation.build(FOLDER).parent / "libptx_machine.so")


@functools.cache
def modules(library: Path | None = None) -> list[str]:
    """The PTX in a built module, csdiv._C unless another one is given.

    Raises:
        FileNotFoundError: no cuobjdump, see ``bench.static.tool``.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [static.tool("cuobjdump"), "--extract-ptx", "all", str(Path(library or _C.__file__).resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)
        return [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]


def host_name(name: str) -> str:
    """A kernel's mangled name as the host's compiler has it: an unnamed namespace names no file."""
    m = re.match(r"(_ZN5csdiv4cuda)(\d+)(_GLOBAL__N_.*)$", name)
    return f"{m[1]}12_GLOBAL__N_1{m[3][int(m[2]) :]}" if m else name


def _addresses(native: ModuleType) -> dict[int, str]:
    """The emulation's kernels by their address in this process."""
    assert native.__file__
    listed = subprocess.run(["nm", native.__file__], capture_output=True, text=True, check=True).stdout
    symbols = {parts[2]: int(parts[0], 16) for line in listed.splitlines() if len(parts := line.split()) == 3}
    base = native.address() - symbols["_ZN9emulation7machineEv"]
    return {base + at: name for name, at in symbols.items() if re.search(r"_kernel[IE]", name) and ".cold" not in name}


def _written(t: Tensor) -> bool:
    """Whether anything has been: torch fills what it allocates here with NaN, or the largest integer."""
    filled = t.isnan() if t.is_floating_point() else t == torch.iinfo(t.dtype).max
    return not bool(filled.all())


def add_kernels(texts: Sequence[str], *, contract: bool = False) -> None:
    """Makes the kernels of PTX modules known to the machine, in the place of those of the same names."""
    for text in texts:
        for kernel in ptx_code.kernels_of(text, contract=contract):
            machine().add(kernel, host_name(kernel.name))


class Ptx(emulation.Emulation):
    """The emulation with the kernels of ``texts``, PTX, in the place of its own."""

    def __init__(self, native: ModuleType, texts: Sequence[str], *, contract: bool = False) -> None:
        super().__init__(native)
        self.machine, self._names = machine(), _addresses(native)
        add_kernels(texts, contract=contract)

    def _plain(self, *_: Any) -> None:
        """Its tensors would be unknown to the machine."""

    def _run(self, function: str, call: Call, arrays: Sequence[Tensor], *, flat: bool = False) -> None:
        self.machine.clear_buffers()
        for problem in (call.problem, flattened(call.problem)):
            for side in (problem.p, problem.q):
                self._add_side(side)
            for index in problem.indices:
                if index is not None:
                    self.machine.add_buffer(index, written=True, read_only=True)
        fresh = not function.endswith("backward")
        for t in arrays:
            self.machine.add_buffer(t, written=not fresh or _written(t), read_only=not fresh)
        for t, _ in call._grads:
            self.machine.add_buffer(t, written=False, read_only=False)
        for t in call._others:
            self.machine.add_buffer(t, written=True, read_only=True)
        library = self.machine.library
        launch, add = (ctypes.cast(f, ctypes.c_void_p).value for f in (library.ptx_launch, library.ptx_add_buffer))
        self.native.use_ptx(launch, add, self._names)
        try:
            super()._run(function, call, arrays, flat=flat)
        except RuntimeError as error:
            raise Finding(str(error)) from error
        finally:
            self.native.use_ptx(0, 0, {})
            self.machine.clear_buffers()
        self.machine.check()

    def _add_side(self, side: Side) -> None:
        for t in (side.means, side.variances, side.log_weights):
            if t is not None:
                self.machine.add_buffer(t, written=True, read_only=True)


@functools.cache
def missing() -> str:
    """Why there is no PTX to run here; empty if there is."""
    try:
        return "" if modules() else f"csdiv._C has no PTX: {_C.cuda_status}"
    except FileNotFoundError as error:
        return str(error)


def install() -> None:
    """Registers the backend, where csdiv._C has PTX."""
    reason = missing()
    status = backends.BackendStatus(not reason, reason)
    backends.register(NAME, lambda: Ptx(emulation.backend().native, modules()), status=lambda: status, full=True)


def backend() -> Ptx:
    """The one that is registered."""
    found = backends.resolve(NAME, torch.device("cpu"))
    assert isinstance(found, Ptx)
    return found


def opcodes() -> Counter[str]:
    """Of all kernels that the machine knows."""
    return sum((kernel.opcodes for kernel in machine().kernels.values()), Counter[str]())
