"""csdiv's GPU backends beside their peers, and the share of what their kernels allow.

The bound is that of the shipped kernels' own hot loops (bench/static.py) at the clock that the device had meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import csdiv
from csdiv import testing

from . import static
from .cases import Case, tensors_of
from .measure import refusal
from .peers import ChunkedEager, Compiled, Csdiv, HandDerived, KeOps, Provider, installed
from .timing import cold_ms

CASES = (
    Case(128, 500, 40, "one step of a small autoencoder: launches show"),
    Case(1024, 1024, 32, "square, few blocks"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(256, 10000, 64, "a batch of codes against a large mixture"),
    Case(8192, 8192, 64, "square, fills the chip"),
    Case(1024, 100000, 64, "a batch of codes against a very large mixture"),
)
NAIVE = Path(__file__).resolve().parent.parent / "build" / "naive" / "csdiv"
"""Where bench/gpu_check.py builds the kernels with groups of one dimension: what sharing reciprocals is worth."""


class Naive(Csdiv):
    """csdiv's own kernels, but with a reciprocal and a logarithm for every dimension."""

    def __init__(self, module: Path) -> None:
        super().__init__("cuda")
        self.name = "csdiv cuda, groups of 1"
        spec = importlib.util.spec_from_file_location("csdiv_naive._C", module)
        assert spec
        assert spec.loader
        self._native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._native)

    def _in_place(self) -> contextlib.AbstractContextManager[object]:
        return mock.patch.object(importlib.import_module("csdiv.backends.cuda").backend, "native", self._native)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        with self._in_place():
            return super().forward(inputs)

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        with self._in_place():
            return super().forward_backward(inputs)


def fitting(case: Case, free: int) -> Case:
    """The case, or one with half of both sizes, and so on, that csdiv and float64 have the memory for."""
    while 200 * (case.n + case.m) * (2 * case.d + 1) > free and case.n * case.m > 1:
        case = case._replace(n=max(1, case.n // 2), m=max(1, case.m // 2))
    return case


def cases(names: list[str] | None) -> list[Case]:
    """Those of these names, or all, as large as free memory allows."""
    free, _ = torch.cuda.mem_get_info()
    return [fitting(case, free) for case in CASES if not names or case.name in names]


def providers(case: Case) -> list[Provider]:
    """csdiv's backends that can run here, and every peer that is installed."""
    everyone: list[Provider] = [Csdiv(name) for name in ("cuda", "triton") if name in csdiv.available_backends()]
    everyone += [Naive(module) for module in sorted(NAIVE.glob("_C.*"))[:1]]
    everyone.append(ChunkedEager(chunk_bytes=2**28))
    everyone += [Compiled(), HandDerived()]
    if installed("pykeops"):
        everyone.append(KeOps())
    return everyone


def device_info() -> dict[str, str]:
    """Name, driver and versions of the current GPU, for every result that is written."""
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm")
    values = _query(",".join(fields)).split(", ")
    return dict(zip(fields, values, strict=True)) | {
        "processors": str(torch.cuda.get_device_properties().multi_processor_count),
        "cuda": str(torch.version.cuda),
        "kernels": csdiv._C.cuda_status,
    }


def _query(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 else ", ".join(["unknown"] * (fields.count(",") + 1))


@contextlib.contextmanager
def clocks() -> Iterator[list[int]]:
    """The multiprocessors' clock in MHz, read every second while the block runs."""
    read, stop = list[int](), threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            with contextlib.suppress(ValueError):
                read.append(int(_query("clocks.sm")))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield read
    finally:
        stop.set()
        watcher.join()


def instructions(kernels: list[static.Kernel], dim: int) -> dict[str, float]:
    """Instructions per element of the hot loops, forward and forward + backward with the logits computed again.

    Of the sweep with the number of lanes that costs least, idle ones counted, as csrc/cuda/gradient_sweep.cu chooses.
    """
    logits, sweeps = 0.0, []
    for kernel in kernels:
        match = re.fullmatch(r"overlap_lse_(forward|backward)_kernel<float(?:, (\d+))?>", kernel.name)
        if match is None:
            continue
        for loop in kernel.loops:
            if loop.counts["MUFU.LG2"]:
                logits = loop.instructions
            else:
                lanes = int(match[2])
                sweeps.append(loop.instructions * -(-dim // lanes) * lanes / dim)
    return {"forward": logits, "forward + backward": 2 * logits + min(sweeps)}


def add_bounds(records: list[dict[str, Any]], clock_mhz: float) -> None:
    """Adds to the CUDA kernels' records the share of their bound that they reach."""
    capability = torch.cuda.get_device_capability()
    try:
        kernels = [k for k in static.read() if re.match(f"sm_{capability[0]}{capability[1]}(?!\\d)", k.architecture)]
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no bounds: {error}")
        return
    lanes = torch.cuda.get_device_properties().multi_processor_count * static.issue_lanes(capability)
    for record in records if kernels else ():
        if record["provider"] == "csdiv cuda" and "gel_per_s" in record:
            dim = int(str(record["case"]).split("x")[-1])
            bound = lanes * clock_mhz * 1e-3 / instructions(kernels, dim)[record["direction"]]
            record["bound_gel_per_s"] = bound
            record["share_of_bound"] = record["gel_per_s"] / bound


FULL_CASES = ((4096, 4096, 3), (2048, 2048, 5), (1024, 1024, 8), (512, 512, 32))


def _gradients(value: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value(), leaves)


def full_covariances(count: int = 5) -> list[dict[str, Any]]:
    """D_CS of mixtures with full covariances and its gradients, on "cuda" and by the reference: times and the error."""
    records = []
    for n, m, dim in FULL_CASES:
        p, q = (testing.random_mixture(k, dim, structure="full", dtype=torch.float64).to("cuda") for k in (n, m))
        leaves = [t.requires_grad_() for side in (p, q) for t in tensors_of(side)]
        truth = None
        for backend in ("reference", "cuda"):
            if backend not in csdiv.available_backends():
                continue

            forward = functools.partial(csdiv.cs_divergence, p, q, backend=backend)
            gradients = functools.partial(_gradients, forward, leaves)
            value = forward().detach()
            truth = value if truth is None else truth
            records.append(
                {
                    "case": f"{n}x{m}x{dim} full",
                    "provider": f"csdiv {backend}, float64",
                    "forward_ms": cold_ms(forward, count),
                    "forward_backward_ms": cold_ms(gradients, count),
                    "error_nats": (value - truth).abs().item(),
                }
            )
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """Time, rate, share of the bound, memory and error of every provider that passed the gate."""
    lines = [
        "| case | direction | provider | warm ms | cold ms | Tel/s | times csdiv | of the bound | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    csdiv_ms: dict[tuple[str, str], float] = {}
    for r in records:
        head = f"| {r['case']} | {r['direction']} | {r['provider']} "
        if reason := refusal(r):
            lines.append(f"{head}| {reason} | | | | | | |")
            continue
        share = f"{r['share_of_bound']:.0%}" if "share_of_bound" in r else ""
        ratio = r["median_ms"] / csdiv_ms.setdefault((r["case"], r["direction"]), r["median_ms"])
        lines.append(
            f"{head}| {r['median_ms']:.3f} | {r['cold_ms']:.3f} | {r['gel_per_s'] / 1e3:.3f} | {ratio:.1f} | {share} "
            f"| {r['extra_peak_mib']} | {r['relative_error']:.1e} |"
        )
    return "\n".join(lines)
