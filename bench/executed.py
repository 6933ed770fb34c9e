"""What a call on CUDA tensors consists of, without a GPU: launches of the host code, and what their PTX does.

Needs a checkout, whose tests/ have the emulation and the machine that executes PTX, and a csdiv._C with CUDA kernels.
"""

from __future__ import annotations

import functools
import heapq
import importlib
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import static
from .cases import Case, make_inputs
from .peers import Csdiv, leaves_of

ROOT = Path(__file__).resolve().parent.parent
TILE = 64


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
    return Case(128, 512, dim, "", entry)


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
    with tests("launches").recorded(tests("emulation").PROCESSORS) as launches:
        call(case, "emulation", "forward + backward")
    return next((copies(case, found) for x in launches if (found := cuts(x.parameters, x.blocks))), 1.0)


class Cut(NamedTuple):
    """How the sweep over a sum of pairs is cut, see csrc/cuda/partition.h."""

    row_ranges: int
    column_ranges: int
    phases: int


def cuts(parameters: bytes, blocks: int) -> list[Cut]:
    """Those in a sweep's parameters: three integers, and then how many blocks follow from them, in 8 bytes."""
    found, total = [], 0
    for at in range(0, len(parameters) - 23, 4):
        cut = Cut(*struct.unpack_from("iii", parameters, at))
        count = struct.unpack_from("q", parameters, (at + 12 + 7) // 8 * 8)[0]
        if min(cut) > 0 and cut.row_ranges % cut.phases == cut.column_ranges % cut.phases == 0:
            of_phase = cut.row_ranges * (cut.column_ranges // cut.phases)
            if count == of_phase and total + count <= blocks:
                found.append(cut)
                total += count
    return found if total == blocks else []


def copies(case: Case, found: list[Cut]) -> float:
    """Components of all sides, each as often as its sums are copied, and once more for what is written of it."""
    sides = zip(sums_of(case), found, strict=True)
    return sum(n * (1 + c.column_ranges / c.phases) + m * (1 + c.row_ranges / c.phases) for (n, m, _), c in sides)


def sums_of(case: Case) -> list[tuple[int, int, bool]]:
    """Rows, columns and whether it is the upper triangle, of the sums over pairs that an entry takes together."""
    triangles = {"divergence": (case.n, case.m), "regularizer": (case.m,), "self": (case.m,)}.get(case.entry, ())
    pairs = [] if case.entry == "self" else [(case.n, case.m, False)]
    return pairs + [(k, k, True) for k in triangles]


def tiles_of(rows: range, columns: range, triangle: bool) -> int:
    """Those that a block with these ranges of tiles goes through."""
    if not triangle:
        return len(rows) * len(columns)
    return sum(max(0, columns.stop - max(columns.start, row)) for row in rows)


def sweep_works(case: Case, found: list[Cut], phase: int) -> list[int]:
    """Tiles of each block of a launch of the sweep."""
    works = []
    for (n, m, triangle), cut in zip(sums_of(case), found, strict=True):
        rows, columns = _ranges(-(-n // TILE), cut.row_ranges), _ranges(-(-m // TILE), cut.column_ranges)
        for row, its_rows in enumerate(rows):
            for copy in range(cut.column_ranges // cut.phases):
                column = copy * cut.phases + (phase - row) % cut.phases
                works.append(tiles_of(its_rows, columns[column], triangle))
    return works


def _ranges(size: int, parts: int) -> list[range]:
    return [range(size * k // parts, size * (k + 1) // parts) for k in range(parts)]


def even_works(case: Case, blocks: int) -> list[int]:
    """Tiles of each block of the row sums, which have parts of the columns of a tile of rows."""
    sizes = [(range(-(-n // TILE)), range(-(-m // TILE)), triangle) for n, m, triangle in sums_of(case)]
    return [len(part) for part in _ranges(sum(tiles_of(*size) for size in sizes), blocks)]


def makespan(works: Sequence[int], slots: int) -> int:
    """Until the last of the blocks has ended."""
    ends = [0] * slots
    for work in works:
        heapq.heapreplace(ends, ends[0] + work)
    return max(ends)
