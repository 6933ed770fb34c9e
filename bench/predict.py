"""How long the CUDA kernels are expected to take on three GPUs: ``python -m bench static --predict``.

No GPU has run them; a measurement is to refute or confirm this. It needs a checkout, a csdiv._C with CUDA kernels and
nvdisasm, and takes from

- the host code (tests/launches.py): launches, their blocks, and how the gradient sweep is cut, so how evenly blocks
  fill a GPU: they are given out in order, the next one to the multiprocessor that has room first; those of the row sums
  are taken to be alike;
- machine code (bench/static.py): instructions and special functions of the hot loops for an element;
- shipped PTX, executed on the CPU (tests/ptx.py) for a few tiles: all other instructions, those in float64, cycles of
  shared memory with bank conflicts, sectors of global memory, and how often a warp waits for global memory.

Assumed, of every GPU: the figures of ``GPUS``; instructions are issued in ``ISSUED`` of the cycles in which they could
be where a multiprocessor has two blocks, in ``ISSUED_ALONE`` where it has one; what does not use the same unit overlaps
(the largest of issue, special functions, float64, shared memory and L2 cache counts), except that a block waits for
every access that depends on an earlier one, while the other block goes on. A launch takes ``LAUNCH_US`` beside its
blocks. Small kernels issue as single warps do, one instruction in ``WARP_CYCLES``. The host takes ``HOST_US`` for a
call and ``HOST_LAUNCH_US`` for a launch; a call takes what the device or the host takes, whichever is longer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import executed, static
from .cases import DIRECTIONS, GPU_CASES, Case
from .partition import TILE, Cut, makespan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- predicted: python -m bench static --predict -->", "<!-- end of predicted -->"

BLOCK_WARPS = 8
ISSUED, ISSUED_ALONE = 0.88, 0.60
LAUNCH_US, HOST_LAUNCH_US = 2.0, 4.0
HOST_US = {"forward": 45.0, "forward + backward": 110.0}
WARP_CYCLES, RESIDENT_WARPS = 6.0, 48
SPECIAL_LANES, SECTOR_BYTES = 16, 32


class Gpu(NamedTuple):
    """Figures of a GPU: rates at its highest clock, latencies in cycles of it."""

    name: str
    capability: tuple[int, int]
    processors: int
    clock_ghz: float
    float64_lanes: int
    l2_bytes_per_cycle: float  # of a multiprocessor
    l2_mib: int
    l2_latency: int
    memory_gb_s: float
    memory_latency: int


GPUS = (
    Gpu("H200", (9, 0), 132, 1.98, 64, 21.0, 50, 280, 4800, 800),
    Gpu("A100", (8, 0), 108, 1.41, 32, 26.0, 40, 210, 2000, 570),
    Gpu("RTX 4090", (8, 9), 128, 2.52, 2, 16.0, 72, 280, 1008, 620),
)
CASES = (
    *GPU_CASES,
    Case(128, 500, 40, "D_CS", "divergence"),
    Case(8192, 8192, 64, "D_CS", "divergence"),
    Case(5000, 5000, 16, "a self term", "self"),
    Case(256, 500, 40, "the regularizer", "regularizer"),
)
NOTHING = executed.Counts(0, 0, 0, 0, 0, 0)
"""Of a small kernel that large cases alone have: its launch."""
TARGETS = ("8192x8192x64", "1024x100000x64")
"""Cases whose share of the issue bound is the aim."""


class Model:
    """One GPU, and the machine code that runs on it."""

    def __init__(self, of: Gpu, kernels: list[static.Kernel]) -> None:
        self.gpu = of
        near = static.running_on(kernels, of.capability) or static.running_on(kernels, (9, 0))
        self.loops = {kernel.name: kernel.loops for kernel in near}
        self.architecture = near[0].architecture
        self.rate = static.issue_lanes(of.capability) / 32  # instructions of warps per cycle

    def bound_ms(self, case: Case, direction: str) -> float:
        """If nothing but the instructions of the hot loops took time; the sweep's logits are not computed again."""
        loops = self._hot(f"overlap_lse_backward_kernel<float, {self._lanes(case.d)}>")
        logits = min(loop.instructions for loop in loops if loop.counts["MUFU.LG2"])
        sweep = min(loop.instructions for loop in loops if not loop.counts["MUFU.LG2"])
        each = logits + (direction != "forward") * (logits + sweep)
        elements = sum(of.n * of.m / (1 + of.itself) for of in executed.sums_of(case)) * case.d
        return elements * each / 32 / self.rate / self.gpu.processors / self.gpu.clock_ghz / 1e6

    def _hot(self, name: str) -> tuple[static.Loop, ...]:
        return self.loops[name]

    def _lanes(self, dim: int) -> int:
        names = [name for name in self.loops if name.startswith("overlap_lse_backward_kernel<float")]
        widths = [int(name.split(", ")[1][:-1]) for name in names]
        return min(widths, key=lambda w: -(-dim // w) * w * (9.2 + 42 / w))

    def missing(self, case: Case, cuts: Sequence[Cut]) -> float:
        """The share of the sweep's accesses that the L2 cache has no room for: each block goes through the sums of all
        of its columns again for every tile of its rows."""
        sides = zip(executed.sums_of(case), cuts, strict=True)
        components = sum(of.m * cut.row_ranges / cut.phases for of, cut in sides) + TILE * 2 * self.gpu.processors
        return max(0.0, 1 - self.gpu.l2_mib * 2**20 / (components * (2 * case.d + 1) * 8))

    def tile_cycles(self, name: str, counts: executed.Counts, dim: int, missing: float) -> tuple[float, float]:
        """Of a tile where two blocks share a multiprocessor, for both of them, and where one is alone."""
        hot = special = 0.0
        for loop in self._hot(name):
            lanes = 4 if loop.counts["MUFU.LG2"] else int(name.split(", ")[1][:-1])
            elements = TILE * TILE * -(-dim // lanes) * lanes / 32
            hot += loop.instructions * elements
            special += loop.special * elements
        g = self.gpu
        issue = (hot + counts.other) / self.rate
        throughput = max(
            issue,
            special * 32 / SPECIAL_LANES,
            counts.float64 * 32 / g.float64_lanes,
            counts.shared_cycles,
            counts.sectors * SECTOR_BYTES / g.l2_bytes_per_cycle,
            missing * counts.sectors * SECTOR_BYTES / (g.memory_gb_s / g.processors / g.clock_ghz),
        )
        latency = (1 - missing) * g.l2_latency + missing * g.memory_latency
        alone = max(issue, throughput) / ISSUED_ALONE + counts.waits / BLOCK_WARPS * latency
        return max(2 * throughput / ISSUED, alone), alone

    def small_us(self, counts: executed.Counts, blocks: int) -> float:
        """Of a kernel beside the tiles."""
        warps = min(blocks * BLOCK_WARPS, self.gpu.processors * RESIDENT_WARPS)
        cycles = max(
            counts.other / self.rate / self.gpu.processors / ISSUED_ALONE,
            counts.other * WARP_CYCLES / warps,
            counts.float64 * 32 / self.gpu.float64_lanes / min(self.gpu.processors, blocks),
        )
        return cycles / self.gpu.clock_ghz / 1e3

    def milliseconds(self, case: Case, direction: str) -> dict[str, Any]:
        """What a call takes, and of what."""
        executed.install()
        with executed.tests("launches").recorded(self.gpu.processors) as launches:
            executed.call(case, "emulation", direction)
        costs, phases = executed.calibration(case.entry, case.d), 0
        reference, cuts = executed.reference(case.entry, case.d), executed.cuts_of(case, self.gpu.processors)
        scale = sum(of.n + of.m for of in executed.sums_of(case)) / sum(
            of.n + of.m for of in executed.sums_of(reference)
        )
        copied = executed.copies(case, cuts) / executed.copies_of_calibration(case.entry, case.d)
        tiles = sum(executed.even_works(reference, 1))
        kinds: dict[str, float] = dict.fromkeys(("launches", "other kernels", "row sums", "sweep"), 0.0)
        work = time = 0.0
        for launch in launches:
            name, counts = launch.kernel, costs.get(launch.kernel, NOTHING)
            kinds["launches"] += LAUNCH_US
            if not name.startswith("overlap_lse"):
                counts = counts.times(copied if name.startswith("write_gradients") else scale)
                kinds["other kernels"] += self.small_us(counts, launch.blocks)
                continue
            sweep = "backward" in name
            works = executed.sweep_works(case, cuts, phases) if sweep else executed.even_works(case, launch.blocks)
            phases += sweep
            missing = self.missing(case, cuts) if sweep else 0.0
            both, alone = self.tile_cycles(name, counts.times(1 / tiles), case.d, missing)
            busy, slots = sum(work > 0 for work in works), self.gpu.processors * 2
            longest = makespan(works, slots) * (alone if busy <= self.gpu.processors else both)
            kinds["sweep" if sweep else "row sums"] += longest / self.gpu.clock_ghz / 1e3
            if busy > self.gpu.processors:
                work, time = work + sum(works) / slots, time + makespan(works, slots)
        device = sum(kinds.values()) / 1e3
        host = (HOST_US[direction] + HOST_LAUNCH_US * len(launches)) / 1e3
        return {
            "gpu": self.gpu.name,
            "architecture": self.architecture,
            "case": case.name,
            "direction": direction,
            "launches": len(launches),
            "device_ms": device,
            "host_ms": host,
            "ms": max(device, host),
            "share_of_bound": self.bound_ms(case, direction) / max(device, host),
            "filled": work / time if time else None,
            "us": {kind: round(us, 1) for kind, us in kinds.items()},
        }


def run(
    cases: Sequence[Case] = CASES,
    of: Sequence[Gpu] = GPUS,
    directions: Sequence[str] = DIRECTIONS,
    kernels: list[static.Kernel] | None = None,
) -> list[dict[str, Any]]:
    """A record for each GPU, case and direction; of csdiv._C, unless its ``kernels`` are given."""
    kernels = kernels or static.read()
    models = [Model(one, kernels) for one in of]
    return [model.milliseconds(case, way) for case in cases for way in directions for model in models]


def gpus() -> str:
    """The figures that are assumed."""
    lines = [", ".join(f"{key} {value}" for key, value in of._asdict().items()) for of in GPUS]
    return "\n".join(lines)


def expected(case: str, name: str, path: Path = RESULTS / "predicted.json") -> dict[str, float]:
    """Milliseconds that were predicted of a case on the GPU of this name, by direction."""
    records = json.loads(path.read_text())["records"] if path.exists() else []
    return {r["direction"]: r["ms"] for r in records if r["case"] == case and r["gpu"] in name}


def measured(path: Path = RESULTS / "gpu.json") -> dict[tuple[str, str], float]:
    """Milliseconds of csdiv's CUDA kernels by case and direction; none of a rehearsal."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    if results.get("dry_run"):
        return {}
    own = (r for r in results["records"] if r["provider"] == "csdiv cuda" and "median_ms" in r)
    return {(r["case"], r["direction"]): r["median_ms"] for r in own}


def markdown(records: list[dict[str, Any]], taken: dict[tuple[str, str], float]) -> str:
    """Predicted times and shares of the issue bound, and the measured time where there is one."""
    names = list(dict.fromkeys(r["gpu"] for r in records))
    lines = [
        "Predicted, not measured: milliseconds, and the share of the issue bound of the hot loops.",
        "",
        f"| case | direction | launches | {' | '.join(names)} | limited on the {names[0]} by | measured |",
        "|---" * (5 + len(names)) + "|",
    ]
    for case, way in dict.fromkeys((r["case"], r["direction"]) for r in records):
        row = [r for r in records if (r["case"], r["direction"]) == (case, way)]
        shown = " | ".join(f"{r['ms']:.3g}, {r['share_of_bound']:.0%}" for r in row)
        time = f"{taken[case, way]:.3g}" if (case, way) in taken else "not yet"
        lines.append(f"| {case} | {way} | {row[0]['launches']} | {shown} | {reason(row[0])} | {time} |")
    return "\n".join(lines)


def reason(record: dict[str, Any]) -> str:
    """What takes most of the time."""
    if record["host_ms"] > record["device_ms"]:
        return f"the host; {record['device_ms'] * 1e3:.0f} µs on the device"
    kind = max(record["us"], key=record["us"].get)
    share = record["us"][kind] / 1e3 / record["device_ms"]
    filled = f", blocks fill {record['filled']:.0%}" if record["filled"] else ""
    return f"{kind} {share:.0%}{filled}"


def targets(records: list[dict[str, Any]]) -> str:
    """The shares of the issue bound that are aimed at, one line each."""
    shown = [r for r in records if r["gpu"] == GPUS[0].name and r["case"] in TARGETS]
    return "\n".join(f"{r['case']} {r['direction']}: {r['share_of_bound']:.0%} of the issue bound" for r in shown)


def write_page(records: list[dict[str, Any]], page: Path = ROOT / "docs" / "kernels.md") -> None:
    """Puts the table between the marks in docs/kernels.md."""
    text = page.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:begin]}\n\n{markdown(records, measured())}\n\n{text[end:]}")
