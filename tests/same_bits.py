"""Compares two builds of csdiv, bit by bit: values, gradients and what is raised, on every backend that runs here.

    python tests/same_bits.py OLD NEW [--quick] [-k cpu/log_overlap]

OLD and NEW are checkouts, each with a built ``.venv``. A worker in each runs the cases below on csdiv's public
functions and writes digests; cases that differ run once more, and keep their arrays. NaN is one value here: its sign
and payload are no number. Cases of "emulation" build the CUDA sources for the host in ``build/emulation``.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import csdiv

sys.path.append(str(Path(__file__).resolve().parent))  # workers run isolated
from same_bits_cases import Results, every_case, number, others, outcome, run


def canonical(value: Tensor | str) -> Tensor | str:
    if isinstance(value, str):
        return value
    value = value.detach().contiguous()
    return torch.where(value.isnan(), math.nan, value) if value.is_floating_point() else value


def digest(value: Tensor | str) -> str:
    if isinstance(value, str):
        return value
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def work(job: dict[str, Any]) -> None:
    """Runs cases in this process, on the csdiv of ``job["checkout"]``."""
    checkout = Path(job["checkout"])
    sys.path.insert(0, str(checkout / "tests"))
    import csdiv._C as _C

    assert Path(csdiv.__file__).is_relative_to(checkout), f"{csdiv.__file__} is not in {checkout}"
    narrower = _C.cpu_isas()[: _C.cpu_isas().index(_C.cpu_isa())]
    share = 6 if job["quick"] else 1

    def chosen(name: str) -> bool:
        return name in job["names"] if job["names"] else job["match"] in name and number(f"quick {name}") % share == 0

    cases: dict[str, Callable[[], Results]] = {
        name: functools.partial(run, case) for case in every_case(narrower) if chosen(name := str(case))
    }
    if any(name.startswith("interpreter/") for name in cases):
        import interpreter  # before torch imports triton, which the mode below makes it do

        interpreter.install()
        if interpreter.NAME not in csdiv.available_backends():
            cases = {name: call for name, call in cases.items() if not name.startswith("interpreter/")}
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN: what is never written shows
    if any(name.startswith("emulation/") for name in cases):
        import emulation

        emulation.install(emulation.load(emulation.build(checkout / "build" / "emulation")))
    cases |= {name: functools.partial(outcome, call) for name, call in others().items() if chosen(name)}
    digests, kept, seconds = {}, {}, collections.Counter[str]()
    for name, call in cases.items():
        start = time.perf_counter()
        found = call()
        seconds[name.split("/")[0]] += time.perf_counter() - start  # type: ignore[assignment]
        results = {output: canonical(value) for output, value in found.items()}
        digests[name] = {output: digest(value) for output, value in results.items()}
        if job["keep"]:
            kept[name] = results
    print(f"{checkout}:", ", ".join(f"{name} {s:.0f} s" for name, s in seconds.items()), file=sys.stderr)
    torch.save(kept, f"{job['output']}.pt")
    Path(job["output"]).write_text(json.dumps(digests))


def both(arguments: argparse.Namespace, folder: str, **job: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the worker of each checkout found: digests, or with ``keep`` the arrays."""
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # idle threads leave the processor to the other worker
    workers, outputs = [], []
    for side in ("old", "new"):
        checkout = getattr(arguments, side).resolve()
        python = getattr(arguments, f"{side}_python") or checkout / ".venv" / "bin" / "python"
        outputs.append(f"{folder}/{side}")
        text = json.dumps({"checkout": str(checkout), "output": outputs[-1], "quick": arguments.quick, **job})
        command = [str(python), "-I", "-W", "ignore", __file__, "--worker", text]
        workers.append(subprocess.Popen(command, cwd=checkout, env=environment))
    if sum(worker.wait() != 0 for worker in workers):
        raise SystemExit("a worker failed")
    old, new = (
        torch.load(f"{output}.pt") if job["keep"] else json.loads(Path(output).read_text()) for output in outputs
    )
    return old, new


def difference(old: Tensor | str, new: Tensor | str) -> str:
    if isinstance(old, str) or isinstance(new, str) or old.shape != new.shape or old.dtype != new.dtype:
        return " -> ".join(v if isinstance(v, str) else f"{v.dtype} {tuple(v.shape)}" for v in (old, new))
    old, new = (v if v.is_floating_point() else v.double() for v in (old, new))
    same = (old == new) & (old.signbit() == new.signbit()) | old.isnan() & new.isnan()
    gap = (old.double() - new.double()).abs()[~same]
    return f"{gap.numel()} of {old.numel()} elements, {gap.max().item() if gap.numel() else 0.0:.3g} at most"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout with a built .venv")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--old-python", type=Path, help="an interpreter in place of OLD/.venv/bin/python")
    parser.add_argument("--new-python", type=Path)
    parser.add_argument("-k", default="", help="only cases with this in their name")
    parser.add_argument("--quick", action="store_true", help="one case of six")
    parser.add_argument("--show", type=int, default=10, help="how many of the cases that differ are described")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old, new = both(arguments, folder, match=arguments.k, names=None, keep=False)
        names = list(old | new)
        different = [name for name in names if old.get(name) != new.get(name)]
        shown = different[: arguments.show]
        kept = both(arguments, folder, match="", names=shown, keep=True) if shown else ({}, {})
    for name in shown:
        sides = [side.get(name, {}) for side in kept]
        print(name)
        for output in sides[0] | sides[1]:
            if old.get(name, {}).get(output) != new.get(name, {}).get(output):
                print(f"  {output}: {difference(*(side.get(output, 'absent') for side in sides))}")
    for backend in dict.fromkeys(name.split("/")[0] for name in names):
        mine = [name for name in names if name.split("/")[0] == backend]
        print(f"{backend}: {len(mine)} cases, {sum(len(old.get(name, {})) for name in mine)} arrays")
    print(f"{len(different)} of {len(names)} cases differ")
    return int(bool(different) or not names)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
