"""``python -m bench``: csdiv beside its peers (cpu), beside float64 (accuracy), inside an autoencoder (epochs).

On a GPU (gpu), and what the kernels for it are made of (static), which needs none.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from . import accuracy, limits, static, static_triton
from .cases import CPU_CASES, Case, make_inputs
from .peers import Provider, providers, rows
from .timing import interleave, machine, peak_mib

GATE = 3e-5
"""Largest relative L2 error against float64 with which a provider's time is printed."""


def relative_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative L2 error of the tensors; NaN if any is not finite."""
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("nan")


def exact(inputs: list[Tensor], backward: bool) -> list[Tensor]:
    """The result in float64, by rows, or the five gradients."""
    leaves = [x.double().requires_grad_() for x in inputs]
    mu, s, nu, *rest = leaves
    size = max(1, (2**27 if mu.is_cuda else 2**22) // nu.numel())
    values = []
    for i in range(0, len(mu), size):
        with torch.set_grad_enabled(backward):
            value = rows(mu[i : i + size], s[i : i + size], nu, *rest)
        if backward:
            value.sum().backward()
        values.append(value.detach())
    return [x.grad for x in leaves if x.grad is not None] if backward else [torch.cat(values)]


def run_case(case: Case, everyone: list[Provider], rounds: int, device: str = "cpu") -> list[dict[str, object]]:
    inputs = [t.to(device) for t in make_inputs(case)]
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.compiler.reset()  # or the shapes of all cases together would exceed its limit, and it would run eager code
    records = []
    for direction in ("forward", "forward + backward"):
        backward = direction != "forward"
        truth = exact(inputs, backward)
        calls, passed = [], []
        for provider in everyone:
            call = (
                (lambda f=provider.forward_backward: f(inputs))
                if backward
                else (lambda f=provider.forward: [f(inputs)])
            )
            first = time.perf_counter()
            try:
                error = relative_error(call(), truth)
            except torch.OutOfMemoryError as shortage:
                print(f"skipped at {case.name}, {direction}: {provider.name}, {str(shortage).splitlines()[0]}")
                continue
            first = time.perf_counter() - first
            record: dict[str, object] = {
                "case": case.name,
                "direction": direction,
                "provider": provider.name,
                "relative_error": error,
                "first_call_s": round(first, 3),
            }
            records.append(record)
            if error <= GATE:
                record["extra_peak_mib"] = round(peak_mib(call, device), 1)
                if device == "cuda":
                    from .gpu import cold_ms

                    record["cold_ms"] = cold_ms(call)
                calls.append(call)
                passed.append(record)
        for record, timing in zip(passed, interleave(calls, rounds, wait), strict=True):
            record.update(timing._asdict(), gel_per_s=case.elements / timing.median_ms / 1e6)
    return records


def print_table(records: list[dict[str, object]]) -> None:
    print(
        "| case | direction | provider | median ms | quartiles ms | Gel/s | times csdiv | extra MiB | relative error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    reference = {}
    for r in records:
        head = f"| {r['case']} | {r['direction']} | {r['provider']} "
        if "median_ms" not in r:
            print(f"{head}| refused: error {r['relative_error']:.1e} exceeds {GATE:.0e} | | | | | |")
            continue
        reference.setdefault((r["case"], r["direction"]), r["median_ms"])
        ratio = r["median_ms"] / reference[r["case"], r["direction"]]
        print(
            f"{head}| {r['median_ms']:.3f} | {r['lower_ms']:.3f} to {r['upper_ms']:.3f} | {r['gel_per_s']:.2f} "
            f"| {ratio:.1f} | {r['extra_peak_mib']} | {r['relative_error']:.1e} |"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="csdiv bench", description=__doc__)
    parser.add_argument("suite", choices=["cpu", "accuracy", "epochs", "static", "gpu"])
    parser.add_argument("--cases", nargs="*", metavar="NxMxD", help="cpu, gpu: only these cases")
    parser.add_argument("--rounds", type=int, default=7, help="cpu, gpu, epochs: how often each call is timed")
    parser.add_argument("--data", help="epochs: a folder with MNIST's IDX files, or what csdiv train takes")
    parser.add_argument("--markdown", type=Path, help="accuracy: file to write the tables to")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    info = machine()
    records: list[dict[str, object]] = []
    more: dict[str, list[dict[str, object]]] = {}
    if options.suite == "accuracy":
        records = accuracy.run()
        tables = accuracy.markdown(records, info)
        print(tables)
        if options.markdown:
            options.markdown.write_text(tables)
    elif options.suite == "static":
        for read in (static.read, static_triton.read):
            try:
                records += static.records(read())
            except (ImportError, FileNotFoundError, RuntimeError) as missing:
                print(f"left out: {missing}")
        print(static.markdown(records))
    elif options.suite == "gpu":
        from . import gpu  # imports what a CPU machine may lack

        info |= gpu.device_info()
        cases = [case for case in gpu.GPU_CASES if not options.cases or case.name in options.cases]
        with gpu.clocks() as read:
            for case in cases:
                records += run_case(case, gpu.providers(case), options.rounds, "cuda")
        if read:
            info["clock_mhz"] = str(max(read))
            gpu.add_bounds(records, max(read))
        print(gpu.markdown(records))
        print(", ".join(f"{key} {value}" for key, value in info.items()))
    elif options.suite == "epochs":
        from . import epochs  # needs the extra "train"

        records = epochs.run(options.data or "digits", options.rounds)
        print(epochs.markdown(records))
    else:
        everyone = providers()
        cases = [case for case in CPU_CASES if not options.cases or case.name in options.cases]
        for case in cases:
            records += run_case(case, everyone, options.rounds)
        more = {
            "bounds": limits.run_bounds(cases, options.rounds),
            "instruction_sets": limits.run_instruction_sets(cases, options.rounds),
            "divergences": limits.run_divergences(options.rounds),
        }
        print_table(records)
        limits.print_tables(**more)
        print(", ".join(f"{key} {value}" for key, value in info.items()))
    if options.output:
        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(
            json.dumps({"date": date, "machine": info, "records": records, **more}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
