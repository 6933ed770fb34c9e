"""What a call on CUDA tensors consists of, without a GPU: launches of the host code, and what their PTX does.

Needs a checkout, whose tests/ have the emulation and the machine that executes PTX, and a csdiv._C with CUDA kernels.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from . import static
from .cases import Case, make_inputs
from .partition import Cut, Sum, block_tiles, ranges
from .peers import Csdiv, leaves_of

ROOT = Path(__file__).resolve().parent.parent
PROCESSORS = 1
"""Multiprocessors that the PTX runs on: as few, so that blocks have several tiles."""


class Counts(NamedTuple):
    """What a kernel did, of one tile of 64 x 64 pairs or in all: warps' instructions and cycles."""

    other: float  # instructions beside the hot loops
    float64: float
    shared_cycles: float
    ideal_cycles: float
    sectors: float
    waits: float  # of a warp, for global memory

    def times(self, factor: float) -> Counts:
        return Counts(*(factor * x for x in self))


def tests(name: str) -> Any:
    """A module of tests/, which are beside bench/ in a checkout."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def call(case: Case, backend: str, direction: str) -> None:
    provider, inputs = Csdiv(backend, case.entry), make_inputs(case)
    if direction == "forward":
        with torch.no_grad():
            provider.forward(inputs)
    else:
        provider.forward_backward(leaves_of(inputs))


@functools.cache
def install() -> None:
    """Makes the backends "emulation" and "ptx" known.

    Raises:
        RuntimeError: csdiv._C has no PTX to run.
    """
    tests("emulation").install()
    tests("ptx").install()
    if reason := tests("ptx").missing():
        raise RuntimeError(reason)


def reference(entry: str, dim: int) -> Case:
    """The case that is executed: small, but with blocks of several tiles."""
    return Case(128, 1024, dim, "", entry)


@functools.cache
def calibration(entry: str, dim: int) -> dict[str, Counts]:
    """What every kernel does in all for ``reference`` with gradients, by executing its PTX."""
    install()
    machine, case = tests("ptx").machine(), reference(entry, dim)
    tests("ptx").backend()
    machine.clear_counts()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # unwritten memory is told from written by its NaN
    try:
        with mock.patch.object(tests("emulation").Emulation, "processors", return_value=PROCESSORS):
            call(case, "ptx", "forward + backward")
    finally:
        torch.use_deterministic_algorithms(deterministic)
    found = {}
    for name, kernel in machine.kernels.items():
        opcodes = {row.line: row.name for row in kernel.rows}
        lines = machine.counts(name)
        hot = {line.executed for line in lines if opcodes.get(line.line, "").startswith("rcp.approx.ftz.f32")}
        if not any(line.executed for line in lines):
            continue
        tiles = "overlap_lse" in name
        found[static.readable(name)] = Counts(
            other=sum(line.executed for line in lines if not tiles or line.executed not in hot),
            float64=sum(line.executed for line in lines if "f64" in opcodes.get(line.line, "").split(".")[1:]),
            shared_cycles=sum(line.cycles for line in lines),
            ideal_cycles=sum(line.ideal_cycles for line in lines),
            sectors=sum(line.sectors for line in lines),
            waits=_waits(lines, opcodes),
        )
    return found


def _waits(lines: Sequence[Any], opcodes: dict[int, str]) -> float:
    """How often warps load from global memory after a store to it, which the loaded may alias: one at a time."""
    waits, stored = 0.0, True
    for line in lines:
        if line.sectors and opcodes.get(line.line) == "st":
            stored = True
        elif line.sectors and opcodes.get(line.line) == "ld" and stored:
            waits, stored = waits + line.executed, False
    return waits


@functools.cache
def copies_of_calibration(entry: str, dim: int) -> float:
    """Sums of gradients that are added up for ``reference``."""
    case = reference(entry, dim)
    return copies(case, cuts_of(case, PROCESSORS))


def cuts_of(case: Case, processors: int) -> list[Cut]:
    """How the gradient sweep is cut on a GPU of so many multiprocessors."""
    native = tests("emulation").backend().native
    sums = [(of.batch, of.n, of.m, of.itself) for of in sums_of(case)]
    return [Cut(*cut) for cut in native.cuda_partitions(4, case.d, sums, processors)]


def copies(case: Case, cuts: Sequence[Cut]) -> float:
    """Components of all sides, each as often as its sums are copied, and once more for what is written of it."""
    sides = zip(sums_of(case), cuts, strict=True)
    return sum(of.n * (1 + c.column_ranges / c.phases) + of.m * (1 + c.row_ranges / c.phases) for of, c in sides)


def sums_of(case: Case) -> list[Sum]:
    """The sums over pairs that an entry takes together."""
    triangles = {"divergence": (case.n, case.m), "regularizer": (case.m,), "self": (case.m,)}.get(case.entry, ())
    pairs = [] if case.entry == "self" else [Sum(case.n, case.m)]
    return pairs + [Sum(k, k, True) for k in triangles]


def sweep_works(case: Case, cuts: Sequence[Cut], phase: int) -> list[int]:
    """Tiles of each block of a launch of the sweep."""
    sides = zip(sums_of(case), cuts, strict=True)
    return [tiles for of, cut in sides for tiles in block_tiles(of, cut, phase)]


def even_works(case: Case, blocks: int) -> list[int]:
    """Tiles of each block of the row sums, which are cut nearly evenly."""
    tiles = sum(sum(block_tiles(of, Cut(1, 1, 1), 0)) for of in sums_of(case))
    return [len(part) for part in ranges(tiles, blocks)]
