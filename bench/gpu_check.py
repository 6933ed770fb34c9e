"""Everything that only a GPU can tell, in one command of a few minutes: ``make gpu-check``.

Builds for the GPU at hand, runs the contract on it, lets compute-sanitizer watch every entry, and times csdiv beside
its peers. Every step has a limit and a log; a step that fails does not keep the next from running. Logs and results go
to the folder in the variable OUT, or to build/gpu-check.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("cuda", "contract", "kernels_edges", "near_zero", "bad_inputs", "oracles", "properties", "autograd")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAST_LINES = 15

EVERY_ENTRY = """
import torch, csdiv
from csdiv import testing
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64):
    for n, m, dim in ((65, 130, 5), (3, 40, 37)):
        p, q = (testing.random_mixture(k, dim, dtype=dtype, generator=g).to("cuda") for k in (n, m))
        leaves = [t.requires_grad_() for s in (p, q) for t in (s.means, s.variances, s.log_weights)]
        for value in (csdiv.cs_divergence(p, q), csdiv.log_overlap(p), csdiv.component_log_overlap(p, q),
                      csdiv.pairwise_log_overlap(p, q)):
            torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        q.assign(p)
torch.cuda.synchronize()
print("ran")
"""


def step(name: str, command: list[str], folder: Path, limit: int, **environment: str) -> bool:
    """Runs a command, keeps its output, prints the end of it; whether it succeeded."""
    begin = time.perf_counter()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=limit, env=os.environ | environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"still running after {limit} s"
        except OSError as error:
            code = str(error)
    ending = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
    print(f"=== {name}: {'passed' if code == 0 else code}, {time.perf_counter() - begin:.0f} s\n{ending}\n", flush=True)
    return code == 0


def main() -> None:
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = sys.executable
    passed = {"gpu": step("gpu", ["nvidia-smi"], folder, 60)}
    wheels = [str(wheel) for wheel in sorted((ROOT / "build" / "wheels").glob("*.whl"))]  # of peers, carried along
    if wheels:
        step("wheels", [python, "-m", "pip", "install", "--no-deps", "--no-index", *wheels], folder, 60)
    build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    passed["build"] = step("build", build, folder, 180, CSDIV_CUDA="on")
    if passed["build"]:
        tests = [f"tests/test_{name}.py" for name in TESTS]
        pytest = [python, "-m", "pytest", "-q", "-k", "gpu or test_cuda", "--maxfail=40", "-p", "no:cacheprovider"]
        passed["tests"] = step("tests", [*pytest, *tests], folder, 240, CI="1")
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for tool in SANITIZERS:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", python, "-c", EVERY_ENTRY]
            passed[tool] = step(tool, command, folder, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        bench = [python, "-m", "bench", "gpu", "--rounds", "5", "--output", str(folder / "gpu.json")]
        passed["bench"] = step("bench", bench, folder, 300)
    (folder / "passed.json").write_text(json.dumps(passed, indent=1) + "\n")
    print(json.dumps(passed))
    sys.exit(not all(passed.values()))


if __name__ == "__main__":
    main()
