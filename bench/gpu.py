"""csdiv's GPU backends beside their peers, and the share of what their kernels allow.

The bound is that of the shipped kernels' own hot loops (bench/static.py) at the clock that the device had meanwhile.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import torch

import csdiv

from . import static
from .cases import Case
from .peers import Compiled, Csdiv, HandDerived, KeOps, Provider, installed

GPU_CASES = (
    Case(128, 500, 40, "one step of a small autoencoder: launches show"),
    Case(1024, 1024, 32, "square, few blocks"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(256, 10000, 64, "a batch of codes against a large mixture"),
    Case(8192, 8192, 64, "square, fills the chip"),
    Case(1024, 100000, 64, "a batch of codes against a very large mixture"),
)
PEER_BYTES = 60 * 2**30
"""Peers whose (N, M, D) temporaries would be larger than this sit out."""


def providers(case: Case) -> list[Provider]:
    """csdiv's backends that can run here, and every peer that is installed and can hold the case."""
    ours: list[Provider] = [Csdiv(name) for name in ("cuda", "triton") if name in csdiv.available_backends()]
    peers: list[Provider] = [Compiled(), HandDerived()] if 8 * case.elements <= PEER_BYTES else []
    return ours + peers + ([KeOps()] if installed("pykeops") else [])


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
    except (FileNotFoundError, KeyError) as error:
        print(f"no bounds: {error}")
        return
    lanes = torch.cuda.get_device_properties().multi_processor_count * static.ISSUE_LANES
    for record in records:
        if record["provider"] == "csdiv cuda" and "gel_per_s" in record:
            bound = lanes * clock_mhz * 1e-3 / per_element[record["direction"]]
            record["bound_gel_per_s"] = bound
            record["share_of_bound"] = record["gel_per_s"] / bound
