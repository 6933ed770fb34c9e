"""Everything that only a GPU can tell, in one command of a few minutes: ``make gpu-check``.

Builds for the GPU at hand, runs the contract on it, lets compute-sanitizer watch every entry, and times csdiv beside
its peers. Every step has a limit and a log; a step that fails does not keep the next from running. Logs and results go
to the folder in the variable OUT, or to build/gpu-check.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    *("cuda", "contract", "full_contract", "full", "kernels_edges", "near_zero", "bad_inputs", "bad_inputs_values"),
    *("oracles", "properties", "autograd"),
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

EVERY_ENTRY = """
import torch, csdiv
from csdiv import testing
g = torch.Generator().manual_seed(0)
names = {"backend": "cuda"}
for dtype in (torch.float32, torch.float64):
    for n, m, dim in ((65, 130, 5), (3, 40, 16), (33, 70, 64)):
        p, q = (testing.random_mixture(k, dim, dtype=dtype, generator=g).to("cuda") for k in (n, m))
        leaves = [t.requires_grad_() for s in (p, q) for t in (s.means, s.variances, s.log_weights)]
        for value in (csdiv.cs_divergence(p, q, **names), csdiv.log_overlap(p, **names),
                      csdiv.component_log_overlap(p, q, **names), csdiv.pairwise_log_overlap(p, q, **names)):
            torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        q.assign(p, **names)
for n, m, dim in ((33, 7, 1), (7, 70, 3), (40, 9, 5), (9, 20, 7), (5, 9, 12), (3, 5, 32)):
    p, q = (testing.random_mixture(k, dim, structure="full", generator=g).to("cuda") for k in (n, m))
    leaves = [t.requires_grad_() for s in (p, q) for t in (s.means, s.scale_tril, s.log_weights)]
    for value in (csdiv.cs_divergence(p, q, **names), csdiv.pairwise_log_overlap(p, q, **names)):
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    q.assign(p, **names)
torch.cuda.synchronize()
print("ran")
"""


DEADLINE_S = 480
"""Of everything: steps that are left when it passes are reported as not run."""
START = time.monotonic()


def step(name: str, command: list[str], folder: Path, limit: float, lines: int = 15, **environment: str) -> bool:
    """Runs a command, keeps its output, prints the end of it; whether it succeeded."""
    begin = time.monotonic()
    limit = min(limit, DEADLINE_S - (begin - START))
    log = folder / f"{name}.log"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # cmake and ninja of an environment
    with log.open("w") as file:
        try:
            if limit <= 0:
                raise OSError(f"not run: {DEADLINE_S} s have passed")
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env=os.environ | {"PATH": path} | environment,
                start_new_session=True,
            )
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            code = f"still running after {limit:.0f} s"
        except OSError as error:
            code = str(error)
    ending = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    print(f"=== {name}: {'passed' if code == 0 else code}, {time.monotonic() - begin:.0f} s\n{ending}\n", flush=True)
    return code == 0


def has_nvcc() -> bool:
    """Whether setup.py would find one."""
    known = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    known += [str(Path(os.environ[name], "bin", "nvcc")) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    known += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return any(path and Path(path).exists() for path in known)


def check_contract(python: str, folder: Path, name: str, selection: str, limit: float) -> dict[str, bool]:
    """The contract on the backends that ``selection`` names; whether it passed."""
    if not (find_spec("pytest") and find_spec("hypothesis")):
        print(f"skipped: {name}, which needs pytest and hypothesis")
        return {}
    tests = [f"tests/test_{test}.py" for test in TESTS]
    pytest = [python, "-m", "pytest", "-q", "--maxfail=40", "-p", "no:cacheprovider", *tests, "-k", selection]
    return {name: step(name, pytest, folder, limit, CI="1")}


def check_memory(python: str, folder: Path) -> dict[str, bool]:
    """Every entry under each tool of compute-sanitizer; whether it passed."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        print(f"skipped: compute-sanitizer, which is not on PATH nor at {sanitizer}")
        return {}
    passed = {}
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", EVERY_ENTRY]
        passed[tool] = step(tool, command, folder, 30, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return passed


def check_cuda(python: str, folder: Path) -> dict[str, bool]:
    """The steps that need the CUDA kernels; those that were taken, and whether they passed."""
    available = "import csdiv; print(csdiv.backend_status()['cuda']); csdiv.warmup(backend='cuda')"
    passed = {"available": step("available", [python, "-c", available], folder, 60)}
    if passed["available"]:
        passed |= check_contract(python, folder, "cuda", "(gpu or test_cuda) and not gpu_triton", 150)
        passed |= check_memory(python, folder)
        naive = ["build_ext", "--build-lib", "build/naive", "--build-temp", "build/naive/temp"]
        build = [python, "setup.py", *naive]  # without it the table lacks a row
        step("naive", build, folder, 60, CSDIV_CUDA="on", CMAKE_ARGS="-DCSDIV_GROUP=1 -DCSDIV_ISAS=baseline")
    return passed


def main() -> None:
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if not shutil.which("nvidia-smi") or not step("gpu", ["nvidia-smi"], folder, 60):
        sys.exit("no GPU: nvidia-smi is not there, or sees none")
    wheels = [str(wheel) for wheel in sorted((ROOT / "build" / "wheels").glob("*.whl"))]  # of peers, carried along
    if wheels:
        step("wheels", [python, "-m", "pip", "install", "--no-deps", "--no-index", *wheels], folder, 60)
    cuda = "on" if has_nvcc() else "off"
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    passed = {"build": step("build", build, folder, 150, CSDIV_CUDA=cuda)}
    if cuda == "off":
        print("skipped: the CUDA kernels, for there is no nvcc")
    elif passed["build"]:
        passed |= check_cuda(python, folder)
    if passed["build"]:
        bench = [python, "-m", "bench", "gpu", "--rounds", "5", "--output", str(folder / "gpu.json")]
        passed["bench"] = step("bench", bench, folder, 240, lines=150)
        if find_spec("lightning") and find_spec("sklearn"):
            swap = [python, "-m", "bench", "swap-in", "--rounds", "3", "--output", str(folder / "swap_in.json")]
            passed["swap_in"] = step("swap_in", swap, folder, 120, lines=40)
        else:
            print("skipped: the training step, which needs the extra 'train'")
        passed |= check_contract(python, folder, "triton", "gpu_triton", DEADLINE_S)  # last: it compiles every kernel
    (folder / "passed.json").write_text(json.dumps(passed, indent=1) + "\n")
    print("failed:", ", ".join(name for name, good in passed.items() if not good) or "nothing")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
