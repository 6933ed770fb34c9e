"""csdiv's GPU backends beside their peers, and the share of what their kernels allow.

The bound is that of the shipped kernels' own hot loops (bench/static.py) at the clock that the device had meanwhile.
Records are those of bench/measure.py, for each case its clock, its bound and what bench/predict.py expects as well.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import csdiv
from csdiv import testing

from . import predict, static
from .cases import GPU_CASES, Case, tensors_of
from .measure import Record, refusal, run_case
from .peers import ChunkedEager, Compiled, Csdiv, HandDerived, KeOps, Provider, installed
from .timing import cold_ms, interleave

BUILD = Path(__file__).resolve().parent.parent / "build"


class Device(NamedTuple):
    """The GPU that is measured."""

    kind: str
    processors: int
    capability: tuple[int, int]
    free_bytes: int
    naive: Path = BUILD / "naive" / "csdiv"
    """Where bench/gpu_check.py builds the kernels with groups of one dimension: what sharing reciprocals is worth."""


STAND_IN = Device("cpu", 132, (9, 0), 2**20, BUILD / "gpu-dry-run" / "naive")
"""tests/stand_in.py on CPU tensors, in a rehearsal."""


def current() -> Device:
    """The current CUDA device."""
    properties = torch.cuda.get_device_properties()
    free, _ = torch.cuda.mem_get_info()
    return Device("cuda", properties.multi_processor_count, (properties.major, properties.minor), free)


class Naive(Csdiv):
    """csdiv's own kernels, but with a reciprocal and a logarithm for every dimension."""

    def __init__(self, module: Path, device: torch.device) -> None:
        super().__init__("cuda")
        self.name, self._device = "csdiv cuda, groups of 1", device
        spec = importlib.util.spec_from_file_location(f"csdiv_naive.{module.name.split('.')[0]}", module)
        assert spec
        assert spec.loader
        self._native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._native)

    def _in_place(self) -> contextlib.AbstractContextManager[object]:
        backend = importlib.import_module("csdiv.backends").resolve("cuda", self._device)
        return mock.patch.object(backend, "native", self._native)

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


def cases(names: list[str] | None, device: Device) -> list[Case]:
    """Those of these names, or all, as large as free memory allows."""
    return [fitting(case, device.free_bytes) for case in GPU_CASES if not names or case.name in names]


def providers(device: Device, alone: bool) -> list[Provider]:
    """csdiv's backends that can run here, and every peer that is installed; or "cuda" alone."""
    able = [name for name in ("cuda", "triton") if name in csdiv.available_backends()]
    everyone: list[Provider] = [Csdiv(name) for name in able]
    if alone:
        return everyone[:1]
    everyone += [Naive(module, torch.device(device.kind, 0)) for module in sorted(device.naive.glob("*.so"))[:1]]
    everyone.append(ChunkedEager(chunk_bytes=2**28))
    everyone += [Compiled(), HandDerived()]
    if installed("pykeops") and device != STAND_IN:
        everyone.append(KeOps())
    return everyone


def device_info(device: Device) -> dict[str, str]:
    """Name, driver and versions of the GPU, for every result that is written."""
    if device == STAND_IN:
        return {"name": "stand-in on the CPU", "kernels": csdiv._C.cuda_status}
    fields = ("name", "driver_version", "memory.total", "clocks.max.sm")
    values = _query(",".join(fields)).split(", ")
    return dict(zip(fields, values, strict=True)) | {
        "processors": str(device.processors),
        "cuda": str(torch.version.cuda),
        "kernels": csdiv._C.cuda_status,
    }


def _query(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 else ", ".join(["unknown"] * (fields.count(",") + 1))


@contextlib.contextmanager
def clocks() -> Iterator[list[int]]:
    """The multiprocessors' clock in MHz, read some times a second while the block runs."""
    read, stop = list[int](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            with contextlib.suppress(ValueError, OSError):
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


def run(
    case: Case, device: Device, name: str, rounds: int, kernels: list[static.Kernel], *, alone: bool = False
) -> list[Record]:
    """The records of a case on the GPU of this name."""
    with clocks() as read:
        records = run_case(case, providers(device, alone), rounds, device.kind)
    if device == STAND_IN:
        read.append(1980)
    for record in records if read else ():
        record["clock_mhz"] = max(read)
    add_bounds(records, device, kernels)
    for record in records:
        if record["provider"] == "csdiv cuda" and (expected := predict.expected(case.name, name)):
            record["predicted_ms"] = expected[record["direction"]]
    return records


def kernels_of(device: Device) -> list[static.Kernel]:
    """The machine code that runs on the GPU; none where it cannot be read."""
    try:
        return static.running_on(static.read(), device.capability)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no bounds: {error}")
        return []


def add_bounds(records: list[Record], device: Device, kernels: list[static.Kernel]) -> None:
    """Adds to the CUDA kernels' records the share of their bound that they reach."""
    lanes = device.processors * static.issue_lanes(device.capability)
    for record in records if kernels else ():
        if record["provider"] == "csdiv cuda" and "gel_per_s" in record and "clock_mhz" in record:
            dim = int(str(record["case"]).split("x")[-1])
            bound = lanes * record["clock_mhz"] * 1e-3 / instructions(kernels, dim)[record["direction"]]
            record["bound_gel_per_s"] = bound
            record["share_of_bound"] = record["gel_per_s"] / bound


FULL_CASES = ((4096, 4096, 3), (2048, 2048, 5), (1024, 1024, 8), (512, 512, 32))


def _milliseconds(call: Callable[[], object], count: int) -> float:
    return interleave([call], count)[0].median_ms


def _gradients(value: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value(), leaves)


def full_covariances(device: Device, count: int = 5) -> list[dict[str, Any]]:
    """D_CS of mixtures with full covariances and its gradients, on "cuda" and by the reference: times and the error."""
    records = []
    smaller, milliseconds = (1, cold_ms) if device.kind == "cuda" else (128, _milliseconds)
    for n, m, dim in FULL_CASES:
        sides = (testing.random_mixture(k // smaller, dim, structure="full", dtype=torch.float64) for k in (n, m))
        p, q = (side.to(device.kind) for side in sides)
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
                    "forward_ms": milliseconds(forward, count),
                    "forward_backward_ms": milliseconds(gradients, count),
                    "error_nats": (value - truth).abs().item(),
                }
            )
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """Time, rate, share of the bound, memory and error of every provider that passed the gate."""
    lines = [
        "| case | direction | provider | warm ms | cold ms | predicted ms | Tel/s | times csdiv | of the bound "
        "| peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    csdiv_ms: dict[tuple[str, str], float] = {}
    for r in records:
        head = f"| {r['case']} | {r['direction']} | {r['provider']} "
        if reason := refusal(r):
            lines.append(f"{head}| {reason} | | | | | | | |")
            continue
        share = f"{r['share_of_bound']:.0%}" if "share_of_bound" in r else ""
        ratio = r["median_ms"] / csdiv_ms.setdefault((r["case"], r["direction"]), r["median_ms"])
        cold = r.get("cold_ms", math.nan)
        expected = f"{r['predicted_ms']:.3f}" if "predicted_ms" in r else ""
        lines.append(
            f"{head}| {r['median_ms']:.3f} | {cold:.3f} | {expected} | {r['gel_per_s'] / 1e3:.3f} | {ratio:.1f} "
            f"| {share} | {r['extra_peak_mib']} | {r['relative_error']:.1e} |"
        )
    return "\n".join(lines)
