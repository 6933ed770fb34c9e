"""``python -m bench ab OLD [NEW]``: two builds of csdiv in turns, for differences that two runs would not show.

OLD and NEW are checkouts, each with a built ``.venv``; NEW is this one by default. A process in each stays alive and is
asked for blocks of calls, a few milliseconds each, in an order that changes with every round, so that slow phases of
the machine hit both alike. Threads that share their processors with other work make most of the noise: see --threads.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import CPU_CASES, DIRECTIONS, SMALL_CASES, Case, make_inputs
from .measure import Record

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 100
BLOCK_US = 4000.0
PAUSE_S = 0.002
"""Threads wait in a loop for a while after a call, and would take the processor from the other build."""
CASES = (
    Case(10, 10, 2, "the self term of a small prior", "self"),
    Case(32, 10, 10, "a small batch of codes"),
    Case(16, 16, 2, "checks alone", "mixture"),
    *(c for c in CPU_CASES if c.name == "128x500x40"),
    *(c for c in SMALL_CASES if c.structure == "diagonal"),
)
"""Calls whose overhead shows."""


class Build:
    """A process on the csdiv of a checkout, see ab_worker.py."""

    def __init__(self, checkout: Path, python: Path | None = None, threads: int | None = None) -> None:
        checkout = checkout.resolve()
        python = python or checkout / ".venv" / "bin" / "python"
        command = [
            str(python),
            "-I",
            str(Path(__file__).with_name("ab_worker.py")),
            *([str(threads)] if threads else []),
        ]
        self._process = subprocess.Popen(
            command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.about = self._reply()
        if not Path(self.about["csdiv"]).is_relative_to(checkout):
            self.close()
            raise RuntimeError(f"{python} imports csdiv from {self.about['csdiv']}, not from {checkout}")

    def _reply(self) -> Any:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        raise RuntimeError(f"the process of a build has ended: {self._process.wait()}")

    def ask(self, **request: object) -> float:
        """Microseconds of a call in a block of ``repeat`` calls."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        return self._reply()

    def close(self) -> None:
        self._process.communicate()


def interval(old: Sequence[float], new: Sequence[float], samples: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians: rounds are drawn, so that both sides of one stay together."""
    draw = random.Random(0)
    rounds, ratios = list(zip(old, new, strict=True)), []
    for _ in range(samples):
        drawn = draw.choices(rounds, k=len(rounds))
        ratios.append(statistics.median(n for _, n in drawn) / statistics.median(o for o, _ in drawn))
    ratios.sort()
    return ratios[samples // 40], ratios[-samples // 40 - 1]


def run_case(case: Case, builds: tuple[Build, Build], rounds: int, folder: Path) -> list[Record]:
    """A record for each direction."""
    inputs = folder / "inputs.pt"
    torch.save(make_inputs(case), inputs)
    records = []
    for direction in DIRECTIONS[: 1 if case.entry == "mixture" else None]:
        request = {"entry": case.entry, "backward": direction != "forward", "inputs": str(inputs), "repeat": 3}
        slower = max(build.ask(**request) for build in builds)
        repeat = max(1, round(BLOCK_US / slower))
        times: tuple[list[float], list[float]] = ([], [])
        for k in range(rounds):
            for side in (k % 2, 1 - k % 2):
                time.sleep(PAUSE_S)
                times[side].append(builds[side].ask(repeat=repeat))
        old, new = (statistics.median(taken) for taken in times)
        lower, upper = interval(*times)
        sizes = {"old_us": old, "new_us": new, "ratio": new / old, "lower": lower, "upper": upper, "rounds": rounds}
        records.append({"case": case.name, "direction": direction, **sizes})
    return records


def run(
    checkouts: Sequence[Path], names: Sequence[str] | None = None, rounds: int = ROUNDS, threads: int | None = None
) -> list[Record]:
    """The records of all cases, or of those with these names.

    Raises:
        RuntimeError: a checkout whose interpreter has another csdiv.
    """
    sides: list[tuple[Path, Path | None]] = [
        *((checkout, None) for checkout in checkouts),
        (ROOT, Path(sys.executable)),
    ]
    cases = [case for case in CASES if not names or case.name in names]
    with contextlib.ExitStack() as stack:
        old, new = (stack.enter_context(contextlib.closing(Build(*side, threads=threads))) for side in sides[:2])
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return [record for case in cases for record in run_case(case, (old, new), rounds, folder)]


def markdown(records: list[Record]) -> str:
    lines = ["| case | direction | old µs | new µs | new / old | 95 % interval |", "|---|---|---|---|---|---|"]
    for r in records:
        times = f"{r['old_us']:.1f} | {r['new_us']:.1f} | {r['ratio']:.3f} | {r['lower']:.3f} to {r['upper']:.3f}"
        lines.append(f"| {r['case']} | {r['direction']} | {times} |")
    return "\n".join(lines)
