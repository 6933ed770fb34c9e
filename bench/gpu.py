"""csdiv's GPU backends beside their peers, and the share of what their kernels allow.

The bound is that of the shipped kernels' own hot loops (bench/static.py) at the clock that the device had meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import csdiv

from . import static
from .cases import Case
from .peers import ChunkedEager, Compiled, Csdiv, HandDerived, KeOps, Provider, installed

GPU_CASES = (
    Case(128, 500, 40, "one step of a small autoencoder: launches show"),
    Case(1024, 1024, 32, "square, few blocks"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(256, 10000, 64, "a batch of codes against a large mixture"),
    Case(8192, 8192, 64, "square, fills the chip"),
    Case(1024, 100000, 64, "a batch of codes against a very large mixture"),
)
NAIVE = Path(__file__).resolve().parent.parent / "build" / "naive"
"""Where bench/gpu_check.py builds the kernels with groups of one dimension: what sharing reciprocals is worth."""
FLUSHED_BYTES = 2**28
"""More than the second-level cache of any GPU."""


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

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        cuda = importlib.import_module("csdiv.backends.cuda")
        shipped, cuda.native = cuda.native, self._native
        try:
            yield
        finally:
            cuda.native = shipped

    def forward(self, inputs: list[Tensor]) -> Tensor:
        with self._in_place():
            return super().forward(inputs)

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        with self._in_place():
            return super().forward_backward(inputs)


def providers(case: Case) -> list[Provider]:
    """csdiv's backends that can run here, and every peer that is installed and has the memory for the case."""
    everyone: list[Provider] = [Csdiv(name) for name in ("cuda", "triton") if name in csdiv.available_backends()]
    everyone += [Naive(module) for module in sorted(NAIVE.glob("_C.*"))[:1]]
    everyone.append(ChunkedEager(chunk_bytes=2**28))
    torch.cuda.empty_cache()  # of earlier cases
    free, _ = torch.cuda.mem_get_info()
    if 16 * case.elements <= free:  # (N, M, D) temporaries
        everyone += [Compiled(), HandDerived()]
    else:
        print(f"skipped at {case.name}: torch.compile, for {free / 2**30:.0f} GiB are free")
    if installed("pykeops"):
        everyone.append(KeOps())
    else:
        print("skipped: KeOps, which is not installed")
    return everyone


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
    """The multiprocessors' clock in MHz, read several times a second while the block runs."""
    read, stop = list[int](), threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            with contextlib.suppress(ValueError):
                read.append(int(_query("clocks.sm")))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield read
    finally:
        stop.set()
        watcher.join()


def instructions() -> dict[str, float]:
    """Instructions per element, forward and forward + backward with the logits recomputed, as the module has them."""
    architecture = "sm_" + "".join(map(str, torch.cuda.get_device_capability()))
    found: dict[str, float] = {}
    for kernel in static.read():
        if not kernel.architecture.startswith(architecture):
            continue
        for loop in kernel.loops:
            key = kernel.name.split("_kernel")[0] + (" logits" if loop.counts["MUFU.LG2"] else " gradients")
            found[key] = min(found.get(key, float("inf")), loop.instructions)
    forward, again = found["overlap_lse_forward logits"], found["overlap_lse_backward logits"]
    return {"forward": forward, "forward + backward": forward + again + found["overlap_lse_backward gradients"]}


def add_bounds(records: list[dict[str, Any]], clock_mhz: float) -> None:
    """Adds to the CUDA kernels' records the share of their bound that they reach."""
    try:
        per_element = instructions()
    except (OSError, KeyError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no bounds: {error}")
        return
    lanes = torch.cuda.get_device_properties().multi_processor_count * static.ISSUE_LANES
    for record in records:
        if record["provider"] == "csdiv cuda" and "gel_per_s" in record:
            bound = lanes * clock_mhz * 1e-3 / per_element[record["direction"]]
            record["bound_gel_per_s"] = bound
            record["share_of_bound"] = record["gel_per_s"] / bound


def markdown(records: list[dict[str, Any]]) -> str:
    """Time, rate, share of the bound, memory and error of every provider that passed the gate."""
    lines = [
        "| case | direction | provider | warm ms | cold ms | Tel/s | of the bound | peak MiB | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        head = f"| {r['case']} | {r['direction']} | {r['provider']} "
        if "median_ms" not in r:
            lines.append(f"{head}| refused: error {r['relative_error']:.1e} | | | | | |")
            continue
        share = f"{r['share_of_bound']:.0%}" if "share_of_bound" in r else ""
        lines.append(
            f"{head}| {r['median_ms']:.3f} | {r['cold_ms']:.3f} | {r['gel_per_s'] / 1e3:.3f} | {share} "
            f"| {r['extra_peak_mib']} | {r['relative_error']:.1e} |"
        )
    return "\n".join(lines)
