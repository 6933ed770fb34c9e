"""``python -m bench scaling``: time and memory over the number of components, until a way runs out of one."""

from __future__ import annotations

from collections.abc import Iterator

import csdiv
from csdiv import GaussianMixture, testing

from .cases import DIRECTIONS, Case
from .measure import Record, free_bytes, run_case
from .peers import ChunkedEager, Compiled, Csdiv, Eager, HandDerived, Provider
from .timing import peak_mib

SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
ROWS, DIM = 256, 16
MAX_MS = 1_000.0
"""A provider whose call took this much is not tried ten times larger."""
MEMORY_COMPONENTS = 200_000


def run(rounds: int) -> Iterator[list[Record]]:
    """Values and gradients of ROWS rows against each number of components in turn."""
    slow = set[str]()
    for size in SIZES:
        everyone: list[Provider] = [Csdiv("cpu"), Eager(), ChunkedEager(), Compiled(), HandDerived()]
        case = Case(ROWS, size, DIM, "")
        free = 0.8 * free_bytes("cpu")  # what needs more is not run but written down
        able = [p for p in everyone if p.name not in slow or p.bytes_per_element * case.elements > free]
        found = run_case(case, able, rounds, directions=DIRECTIONS[1:], gate=size <= 10_000)
        for record in found:
            record["components"] = size
            if "skipped" not in record and record["median_ms"] > MAX_MS:
                slow.add(record["provider"])
        yield found


def memory() -> Record:
    """What log V(p, p) and its gradients take of 200 000 components, beside the inputs, in MiB."""
    p = testing.random_mixture(MEMORY_COMPONENTS, DIM).map(lambda t: t.detach().requires_grad_())
    small = testing.random_mixture(100, DIM).map(lambda t: t.detach().requires_grad_())
    csdiv.log_overlap(small).backward()  # what is loaded by the first call is not counted

    def call(p: GaussianMixture = p) -> None:
        csdiv.log_overlap(p).backward()

    return {"components": MEMORY_COMPONENTS, "dim": DIM, "extra_peak_mib": round(peak_mib(call), 1)}
