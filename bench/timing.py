"""Interleaved timing, peak memory, and the machine line."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, quartiles and how many were taken."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    count: int

    def record(self) -> dict[str, Any]:
        """The fields, for a result that is written."""
        return asdict(self)


MIN_MS, SHORT_MS, MAX_MS = 2.0, 100.0, 10_000.0
FLUSHED_BYTES = 2**28
"""More than the second-level cache of any GPU."""


def interleave(
    calls: Sequence[Callable[[], object]],
    rounds: int = 7,
    wait: Callable[[], object] = lambda: None,
    pauses: Sequence[float] = (),
) -> list[Timing]:
    """Times every call once in each round, so that slow phases of the machine hit all alike.

    Calls shorter than ``MIN_MS`` are repeated within a round and averaged; those that would take more than ``MAX_MS``
    in all sit out the last rounds, but have three. Everything must have been called before. ``wait`` returns when the
    device has done what it was given. ``pauses``: seconds for which threads of a call go on after it; the next call is
    put off for so long, and runs once as often untimed if it is short, since processors have slept meanwhile.
    """

    def run(call: Callable[[], object], repeat: int) -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        wait()
        return 1e3 * (time.perf_counter() - start) / repeat

    wait()
    pauses = pauses or [0.0] * len(calls)
    expected = [float("inf")] * len(calls)
    for attempt in range(3):  # one alone may have met an interruption, and would be the only call of its rounds
        for k, (call, pause) in enumerate(zip(calls, pauses, strict=True)):
            if attempt == 0 or expected[k] < SHORT_MS:
                expected[k] = min(expected[k], max(1e-3, run(call, 1)))
                time.sleep(pause)
    repeats = [max(1, round(MIN_MS / ms)) for ms in expected]
    limits = [max(3, int(MAX_MS / ms)) for ms in expected]
    times: list[list[float]] = [[] for _ in calls]
    slept = 0.0
    for _ in range(rounds):
        for call, repeat, limit, taken, pause in zip(calls, repeats, limits, times, pauses, strict=True):
            if len(taken) >= limit:
                continue
            if slept and repeat > 1:
                run(call, repeat)
            taken.append(run(call, repeat))
            time.sleep(slept := pause)
    return [_summary(taken) for taken in times]


def _summary(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(median, lower, upper, len(times))


def cold_ms(call: Callable[[], object], count: int = 5) -> float:
    """The median time of ``call`` on the device where its inputs are not in the cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(count):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def peak_mib(call: Callable[[], object], device: str = "cpu") -> float:
    """What ``call`` takes at its highest, in MiB: of the device, or of the resident set; that on Linux, else NaN."""
    if device == "cuda":
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the high-water mark
    except OSError:
        return float("nan")
    before = _field(status, "VmRSS")
    call()
    return max(0.0, _field(status, "VmHWM") - before)


def _field(status: Path, name: str) -> float:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def machine() -> dict[str, str]:
    """Processor, threads and versions, for every result that is written."""
    import csdiv._C as _C

    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "isa": _C.cpu_isa(),
        "compiler": _C.compiler,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    name = values.get("model name", platform.machine())
    return f"{name}, family {values.get('cpu family')}, model {values.get('model')}"
