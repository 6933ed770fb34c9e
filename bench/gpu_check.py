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
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("cuda", "contract", "kernels_edges", "near_zero", "bad_inputs", "oracles", "properties", "autograd")
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
torch.cuda.synchronize()
print("ran")
"""


def step(name: str, command: list[str], folder: Path, limit: int, lines: int = 15, **environment: str) -> bool:
    """Runs a command, keeps its output, prints the end of it; whether it succeeded."""
    begin = time.perf_counter()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
            )
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
            code = f"still running after {limit} s"
        except OSError as error:
            code = str(error)
    ending = "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    print(f"=== {name}: {'passed' if code == 0 else code}, {time.perf_counter() - begin:.0f} s\n{ending}\n", flush=True)
    return code == 0


def naive_module(python: str) -> list[str]:
    """The command that builds the kernels with groups of one dimension, a baseline of bench/gpu.py."""
    folder = "build/naive"
    options = f"-DCSDIV_GROUP=1 -DCSDIV_CUDA=ON -DCSDIV_ISAS=baseline -DPython_EXECUTABLE={python}"
    pybind11 = f"-Dpybind11_DIR=$({python} -m pybind11 --cmakedir)"
    configure = f"cmake -GNinja -S . -B {folder} -DCMAKE_BUILD_TYPE=Release {options} {pybind11}"
    return ["sh", "-c", f"{configure} && cmake --build {folder}"]


def main() -> None:
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    if not shutil.which("nvidia-smi") or not step("gpu", ["nvidia-smi"], folder, 60):
        sys.exit("no GPU: nvidia-smi is not there, or sees none")
    passed = {}
    wheels = [str(wheel) for wheel in sorted((ROOT / "build" / "wheels").glob("*.whl"))]  # of peers, carried along
    if wheels:
        step("wheels", [python, "-m", "pip", "install", "--no-deps", "--no-index", *wheels], folder, 60)
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    passed["build"] = step("build", build, folder, 180, CSDIV_CUDA="on")
    if passed["build"]:
        available = "import csdiv; print(csdiv.backend_status()['cuda']); csdiv.warmup(backend='cuda')"
        passed["available"] = step("available", [python, "-c", available], folder, 60)
        tests = [f"tests/test_{name}.py" for name in TESTS]
        pytest = [python, "-m", "pytest", "-q", "--maxfail=40", "-p", "no:cacheprovider", *tests, "-k"]
        passed["tests"] = step("tests", [*pytest, "(gpu or test_cuda) and not gpu_triton"], folder, 150, CI="1")
        passed["triton"] = step("triton", [*pytest, "gpu_triton"], folder, 600, CI="1")  # it compiles every kernel
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for tool in SANITIZERS if Path(sanitizer).exists() else ():
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", EVERY_ENTRY]
            passed[tool] = step(tool, command, folder, 40, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if not Path(sanitizer).exists():
            print(f"skipped: compute-sanitizer, which is not on PATH nor at {sanitizer}")
        step("naive", naive_module(python), folder, 90)  # without it the table lacks a row
        bench = [python, "-m", "bench", "gpu", "--rounds", "5", "--output", str(folder / "gpu.json")]
        passed["bench"] = step("bench", bench, folder, 200, lines=150)
    (folder / "passed.json").write_text(json.dumps(passed, indent=1) + "\n")
    print("failed:", ", ".join(name for name, good in passed.items() if not good) or "nothing")
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
