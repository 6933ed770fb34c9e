"""How evenly the gradient sweep of the CUDA kernels is cut: the share of a GPU's time that its blocks would fill.

Blocks are given to the multiprocessors in order, the next one to where there is room first; a tile of pairs takes one
unit of time wherever it is. Launches, of which phases take several, follow each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

TILE = 64
"""Rows of a tile of pairs; columns are as many in float32, half in float64."""


class Sum(NamedTuple):
    """A sum over pairs: ``batch`` times n rows and m columns; of a mixture with itself only pairs j ≥ i."""

    n: int
    m: int
    itself: bool = False
    batch: int = 1


class Cut(NamedTuple):
    """Of a sum, see csrc/cuda/partition.h."""

    row_ranges: int
    column_ranges: int
    phases: int


def ranges(size: int, parts: int) -> list[range]:
    return [range(size * k // parts, size * (k + 1) // parts) for k in range(parts)]


def block_tiles(of: Sum, cut: Cut, phase: int, columns: int = TILE) -> list[int]:
    """Tiles that each block of a launch goes through, in the order of the blocks."""
    row_ranges = ranges(-(-of.n // TILE), cut.row_ranges)
    column_ranges = ranges(-(-of.m // columns), cut.column_ranges)
    found = []
    for row, rows in enumerate(row_ranges):
        for copy in range(cut.column_ranges // cut.phases):
            its = column_ranges[copy * cut.phases + (phase - row) % cut.phases]
            if of.itself:
                first = (r * (TILE // columns) for r in rows)
                found.append(sum(max(its.stop - max(its.start, at), 0) for at in first))
            else:
                found.append(len(rows) * len(its))
    return found * of.batch


def makespan(works: Sequence[int], slots: int) -> int:
    """The time that blocks take which are given out in order."""
    ends = [0] * slots
    for work in works:
        heapq.heapreplace(ends, ends[0] + work)
    return max(ends)


def efficiency(sums: Sequence[Sum], cuts: Sequence[Cut], processors: int, itemsize: int = 4) -> float:
    """Tiles of all sums over what the GPU could do in the time that all launches take."""
    columns, slots = TILE * 4 // itemsize, processors * (8 // itemsize)
    done = time = 0
    for phase in range(cuts[0].phases):
        works = [tiles for of, cut in zip(sums, cuts, strict=True) for tiles in block_tiles(of, cut, phase, columns)]
        done += sum(works)
        time += makespan(works, slots)
    return done / (time * slots)


def copies_bytes(sums: Sequence[Sum], cuts: Sequence[Cut], dim: int) -> int:
    """Memory that the sums of both sides take."""
    copies = (
        of.batch * (of.n * (cut.column_ranges // cut.phases) + of.m * (cut.row_ranges // cut.phases))
        for of, cut in zip(sums, cuts, strict=True)
    )
    return sum(copies) * (2 * dim + 1) * 8
