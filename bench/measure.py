"""One case: every provider through its gate, then timed in turns."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import DIRECTIONS, Case, make_inputs
from .peers import ChunkedEager, Eager, Provider, leaves_of
from .timing import cold_ms, interleave, peak_mib

GATE = 3e-5
"""Largest relative L2 error against float64 with which a provider's time is printed."""
Record = dict[str, Any]


def relative_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative L2 error of the tensors; NaN if any is not finite."""
    errors = [((a.detach().double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def exact(case: Case, inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The values in float64, or the gradients."""
    plain: Provider = Eager(case.entry)
    if case.entry != "pointwise":
        plain = ChunkedEager(case.entry, 2**30 if inputs[0].is_cuda else 2**25)
    doubles = [x.double() for x in inputs]
    with torch.set_grad_enabled(backward):
        return plain.forward_backward(doubles) if backward else [plain.forward(doubles)]


def free_bytes(device: str) -> int:
    """Memory that a computation may take without driving out others."""
    if device == "cuda":
        torch.cuda.empty_cache()  # of earlier cases
        return torch.cuda.mem_get_info()[0]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:
        return 2**33


def run_case(
    case: Case,
    everyone: list[Provider],
    rounds: int,
    device: str = "cpu",
    directions: tuple[str, ...] = DIRECTIONS,
    gate: bool = True,
) -> list[Record]:
    """A record for each provider and direction: its time, or why there is none."""
    inputs = [t.to(device) for t in make_inputs(case)]
    leaves = leaves_of(inputs)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.compiler.reset()  # or the shapes of all cases together would exceed its limit, and it would run eager code
    records = []
    for direction in directions:
        backward = direction != "forward"
        truth = exact(case, inputs, backward) if gate else []
        calls, passed, pauses = [], [], []
        for provider in everyone:
            if direction not in provider.directions:
                continue
            record: Record = {"case": case.name, "direction": direction, "provider": provider.name}
            records.append(record)
            needed = provider.bytes_per_element * case.elements if backward else 0
            if needed > 0.8 * free_bytes(device):
                record["skipped"] = f"needs {needed / 2**30:.0f} GiB"
                continue
            call = functools.partial(provider.values, inputs)
            if backward:
                call = functools.partial(provider.forward_backward, leaves)
            begin = time.perf_counter()
            try:
                found = call()
                wait()
            except torch.OutOfMemoryError as shortage:
                record["skipped"] = str(shortage).splitlines()[0]
                continue
            record["first_call_s"] = round(time.perf_counter() - begin, 3)
            gated = gate and provider.computes
            record["relative_error"] = relative_error(found, truth) if gated else None
            if not gated or record["relative_error"] <= GATE:
                record["extra_peak_mib"] = round(peak_mib(call, device), 1)
                if device == "cuda":
                    record["cold_ms"] = cold_ms(call)
                calls.append(call)
                passed.append(record)
                pauses.append(provider.pause)
        for record, timing in zip(passed, interleave(calls, rounds, wait, pauses), strict=True):
            record.update(timing.record(), gel_per_s=case.elements / timing.median_ms / 1e6)
    return records


def refusal(record: Record) -> str:
    """Why a record has no time; empty if it has."""
    if "median_ms" in record:
        return ""
    return str(record.get("skipped") or f"refused: error {record['relative_error']:.1e} exceeds {GATE:.0e}")


def markdown(records: list[Record]) -> str:
    """The records as a table; the first provider of a case is the one that others are compared with."""
    lines = [
        "| case | direction | provider | median ms | quartiles ms | Gel/s | times csdiv | first call s | extra MiB "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    csdiv_ms: dict[tuple[str, str], float] = {}
    for r in records:
        head = f"| {r['case']} | {r['direction']} | {r['provider']} "
        if reason := refusal(r):
            lines.append(f"{head}| {reason} | | | | | | |")
            continue
        ratio = r["median_ms"] / csdiv_ms.setdefault((r["case"], r["direction"]), r["median_ms"])
        error = "" if r["relative_error"] is None else f"{r['relative_error']:.1e}"
        lines.append(
            f"{head}| {r['median_ms']:.3g} | {r['lower_ms']:.3g} to {r['upper_ms']:.3g} | {r['gel_per_s']:.2f} "
            f"| {ratio:.1f} | {r['first_call_s']:.2f} | {r['extra_peak_mib']} | {error} |"
        )
    return "\n".join(lines)
