"""``python -m bench instructions``: how many instructions one eager call takes, which no other work disturbs.

A process under valgrind's callgrind runs each call FEW and MANY times, in one thread, and dumps the count after each;
the difference belongs to the calls alone. valgrind may not know the machine's widest instruction set: the kernels then
take the next one.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .ab_worker import prepare
from .cases import DIRECTIONS, Case, make_inputs
from .measure import Record
from .peers import Floor

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, FEW, MANY = 30, 20, 220
CASES = (
    Case(16, 16, 2, "checks alone", "mixture"),
    Case(16, 16, 2, "the smallest divergence that is of any use", "divergence"),
    Case(32, 10, 10, "the regularizer of a small batch", "regularizer"),
    Case(100, 16, 2, "densities at a few points", "log_prob"),
)


def calls() -> list[tuple[str, str, Callable[[], object]]]:
    """Case, direction and the call; the last takes no case: it is the yardstick."""
    found: list[tuple[str, str, Callable[[], object]]] = []
    for case in CASES:
        for direction in DIRECTIONS[: 1 if case.entry == "mixture" else None]:
            call = prepare(case.entry, direction == DIRECTIONS[1], make_inputs(case))
            found.append((case.name, direction, call))
    leaves = [t.requires_grad_() for t in make_inputs(CASES[1])]
    return [*found, (Floor.name, DIRECTIONS[1], lambda: Floor().forward_backward(leaves))]


def serve() -> None:
    """What runs under callgrind: two dumps for each call."""
    torch.set_num_threads(1)
    gc.disable()
    for _, _, call in calls():
        for count in (WARM_UP, FEW, MANY):
            torch._C._valgrind_toggle()
            for _ in range(count):
                call()
            torch._C._valgrind_toggle_and_dump_stats()


def run() -> list[Record]:
    """The records of all calls.

    Raises:
        RuntimeError: no valgrind, or one that cannot run this.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None or not torch._C._valgrind_supported_platform():
        raise RuntimeError("bench instructions needs valgrind, and a torch that knows it")
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder) / "calls"
        command = [
            *(valgrind, "--tool=callgrind", f"--callgrind-out-file={dumps}", "--collect-atstart=no"),
            *(sys.executable, "-c", "from bench.instructions import serve; serve()"),
        ]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"valgrind: {done.stderr[-2000:]}")
        counts = [total(Path(f"{dumps}.{k + 1}")) for k in range(3 * len(calls()))]
    return [
        {"call": name, "direction": direction, "instructions": round((many - few) / (MANY - FEW))}
        for (name, direction, _), few, many in zip(calls(), counts[1::3], counts[2::3], strict=True)
    ]


def total(dump: Path) -> int:
    """The instructions of a dump."""
    (found,) = re.findall(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)
    return int(found)


def markdown(records: list[dict[str, Any]]) -> str:
    lines = ["| call | direction | instructions |", "|---|---|---|"]
    lines += [f"| {r['call']} | {r['direction']} | {r['instructions']:,} |" for r in records]
    return "\n".join(lines)
