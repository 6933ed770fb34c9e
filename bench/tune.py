"""Which tile suits each Triton kernel on the GPU at hand: all sensible ones are timed, for every form and several D.

Prints ``TILES`` of kernels/configurations.py as it would be for this GPU, for a person to put there, and the times
beside those of the tiles in force. Nothing is timed when csdiv runs, so its results do not depend on a search.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import csdiv
from csdiv import testing
from csdiv.kernels.configurations import FORMS, TILES, Table, Tile, form_of, takes_products, tile_of

from .cases import tensors_of
from .measure import GATE, relative_error
from .timing import Timing, interleave

SIZES = {8: 2**15, 32: 2**14, 128: 2**13}
"""D, and a size N = M for it: 8.6e9 elements, so that launches do not show."""
MIXTURES = {"diagonal": ("diagonal",) * 2, "spherical": ("spherical",) * 2, "tied": ("tied diagonal",) * 2}
MIXTURES["tied rows"] = ("tied diagonal", "diagonal")
"""What p and q are timed, by the structure of a form."""
LAUNCHES = tuple(
    (kernel, form, dtype) for kernel, products, dtype in TILES for form in FORMS if takes_products(form) == products
)
"""Every kernel, form and dtype that there is."""
Record = dict[str, Any]


def candidates(form: str, dtype: torch.dtype) -> list[Tile]:
    """Those with 4 to 32 pairs for a thread (2 to 8 in float64); matrix products take 16 rows or more, and they alone
    have loads that may run ahead."""
    pairs = range(2, 9) if dtype == torch.float64 else range(4, 33)
    rows, stages = ((16, 32, 64), (1, 2, 3)) if takes_products(form) else ((2, 4, 8, 16, 32), (1,))
    tiles = (Tile(n, warps, k) for n in rows for warps in (4, 8) for k in stages)
    return [tile for tile in tiles if tile.block_n * 4 // tile.num_warps in pairs]


def is_taken(kernel: str, form: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether anything asks for this form: where equal pairs are to give equal bits, some rows have another."""
    forms = {form_of(form.removesuffix(" matrix"), dtype, dim, exact=exact) for exact in (False, kernel == "rows")}
    return form in forms


def call_of(kernel: str, form: str, dtype: torch.dtype, dim: int, size: int, device: str) -> Callable[[], list[Tensor]]:
    """log V(p, q), which is sums of rows for the most part, or its gradients, which are two sweeps.

    Of tied rows it is one: the other has the diagonal form.
    """
    backend, g = importlib.import_module("csdiv.backends.triton").backend, torch.Generator().manual_seed(dim)
    p, q = (
        testing.random_mixture(size, dim, structure=structure, dtype=dtype, generator=g)
        for structure in MIXTURES[form.removesuffix(" matrix")]
    )
    tensors = [t.to(device) for side in (p, q) for t in tensors_of(side)]

    def forward() -> list[Tensor]:
        return backend.forward("log_overlap", tensors, [False] * 6)[0]

    value, _, row_lse = forward()
    needs = [form != "tied rows"] * 3 + [True] * 3
    if kernel == "rows":
        return lambda: [forward()[2]]
    return lambda: backend.backward("log_overlap", torch.ones_like(value), tensors, [value, row_lse], needs)


def measure(
    kernel: str,
    form: str,
    dtype: torch.dtype,
    dim: int,
    tiles: list[Tile],
    *,
    size: int,
    rounds: int,
    device: str,
) -> dict[Tile, Timing]:
    """The times of those tiles that compile, and give what the first one gives."""
    pack, triton = importlib.import_module("csdiv.kernels.pack"), importlib.import_module("triton")

    def with_tile(call: Callable[[], list[Tensor]], tile: Tile) -> list[Tensor]:
        with mock.patch.multiple(pack, form_of=lambda *_, **__: form, tile_of=lambda *_: tile):
            return call()

    call = call_of(kernel, form, dtype, dim, size, device)
    expected = [t.double() for t in with_tile(call, tiles[0])]
    able = []
    for tile in tiles:
        try:
            error = relative_error(with_tile(call, tile), expected)
        except (triton.TritonError, RuntimeError) as refused:
            print(f"{kernel}, {form}, D = {dim}: {tile} left out: {str(refused).splitlines()[0]}")
            continue
        if error <= GATE:
            able.append(tile)
        else:
            print(f"{kernel}, {form}, D = {dim}: {tile} left out: its results differ by {error:.1e}")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = interleave([functools.partial(with_tile, call, tile) for tile in able], rounds, wait)
    return dict(zip(able, timings, strict=True))


def run(rounds: int) -> tuple[list[Record], str]:
    """A record for each kernel, form, dtype and D, and the table with the tiles that are best over forms and D.

    Raises:
        SystemExit: no GPU that triton can use.
    """
    status = csdiv.backend_status()["triton"]
    if not status.available:
        sys.exit(f"bench tune: no GPU to time the Triton kernels on: {status.reason}")
    records, timed = list[Record](), {key: list[dict[Tile, Timing]]() for key in TILES}
    for kernel, form, dtype in LAUNCHES:
        force = tile_of(kernel, form, dtype)
        tiles = [force, *(tile for tile in candidates(form, dtype) if tile != force)]
        for dim, size in SIZES.items():
            if not is_taken(kernel, form, dtype, dim):
                continue
            times = measure(kernel, form, dtype, dim, tiles, size=size, rounds=rounds, device="cuda")
            timed[kernel, takes_products(form), dtype].append(times)
            best = min(times, key=lambda tile: times[tile].median_ms)
            found = {"best": best, "best_ms": times[best].median_ms, "in_force": force}
            records.append({"kernel": kernel, "form": form, "dtype": str(dtype), "dim": dim, **found})
            records[-1] |= {"in_force_ms": times[force].median_ms, "tiles": len(times)}
            print(records[-1], flush=True)
    return records, entry(torch.cuda.get_device_name(), {key: best_of(timed[key]) for key in TILES})


def best_of(timed: list[dict[Tile, Timing]]) -> Tile:
    """Of the tiles that were timed everywhere the one with the least product of times."""
    everywhere = [tile for tile in timed[0] if all(tile in times for times in timed)]
    return min(everywhere, key=lambda tile: sum(math.log(times[tile].median_ms) for times in timed))


def entry(device: str, table: Table) -> str:
    """As it stands in kernels/configurations.py."""
    lines = [f"TILES: Table = {{  # timed on {device}"]
    for (kernel, products, dtype), tile in table.items():
        lines.append(f'    ("{kernel}", {products}, {dtype}): Tile{tuple(tile)},')
    return "\n".join([*lines, "}"])


def markdown(records: list[Record]) -> str:
    """The best tiles beside those in force."""
    lines = [
        "(rows, warps, stages) of a tile, and the median time of a call that is that kernel for the most part\n",
        "| kernel | form | dtype | N = M | D | best | ms | in force | ms | timed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        best, force = (f"{tuple(r[name])} | {r[f'{name}_ms']:.3f}" for name in ("best", "in_force"))
        head = f"| {r['kernel']} | {r['form']} | {r['dtype']} | {SIZES[r['dim']]} | {r['dim']} "
        lines.append(f"{head}| {best} | {force} | {r['tiles']} |")
    return "\n".join(lines)
