"""Everything that only a GPU can tell, in one command of eight minutes: ``make gpu-check``.

First half, four minutes: the build, or one that was carried along; csdiv's own times of three cases; the contract on
"cuda" and "triton"; compute-sanitizer over every entry. Second half: times beside the peers, and beside what
bench/predict.py expects. A step that fails does not keep the next from running; what is known is written after each
step and each case. Logs and results go to the folder in the variable OUT, or to build/gpu-check.

``--prepare FOLDER`` builds csdiv._C, and the same with groups of one dimension, on a machine without a GPU, for
``--prebuilt FOLDER`` with the same Python on one that has it. ``--dry-run`` rehearses every step without a GPU, see
tests/stand_in.py: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    *("cuda", "contract", "full_contract", "full", "kernels_edges", "near_zero", "bad_inputs", "bad_inputs_values"),
    *("oracles", "properties", "autograd"),
)
DRY_TESTS = ("cuda", "oracles", "full_contract")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
QUICK = ("8192x8192x64", "1024x100000x64", "128x500x40")
NAIVE, DRY_NAIVE = ROOT / "build" / "naive" / "csdiv", ROOT / "build" / "gpu-dry-run" / "naive"
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SETUPTOOLS = 77
"""The first that takes the licence as pyproject.toml has it."""
HALVES_S = 240, 480
"""When the halves end, in seconds from the start: steps that are left then are reported as not run."""
PATIENCE = 3
"""Times as long may a rehearsal take, on a few busy CPU cores."""
GRACE_S = 10.0
"""For a step to write what it knows, once it is told to stop."""


@dataclass
class Check:
    """The steps that were taken, and where their logs are."""

    folder: Path
    dry: bool = False
    start: float = field(default_factory=time.monotonic)
    steps: dict[str, dict[str, object]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def step(
        self,
        name: str,
        command: list[str],
        limit: float,
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        lines: int = 15,
        half: int = 0,
    ) -> bool:
        """Runs a command, keeps its output, prints the end of it; whether it succeeded."""
        begin = time.monotonic()
        patience = PATIENCE if self.dry else 1
        limit = min(patience * limit, patience * HALVES_S[half] - (begin - self.start))
        log = self.folder / f"{name}.log"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # an environment's cmake
        with log.open("w") as file:
            try:
                if limit <= 0:
                    raise OSError(f"not run: {HALVES_S[half]} s have passed")
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                    env=os.environ | {"PATH": path} | dict(environment),
                    start_new_session=True,
                    preexec_fn=heed_interrupts,
                )
                code: int | str = process.wait(limit)
            except subprocess.TimeoutExpired:
                stop(process)
                code = f"still running after {limit:.0f} s"
            except OSError as error:
                code = str(error)
        self.record(name, code, time.monotonic() - begin, log.read_text(errors="replace"), lines)
        return code == 0

    def record(self, name: str, code: int | str, seconds: float, output: str, lines: int = 15) -> None:
        """Prints how a step ended, and writes the results so far."""
        ending = "\n".join(output.splitlines()[-lines:])
        with self.lock:
            self.steps[name] = {"passed": code == 0, "ended": code, "seconds": round(seconds, 1)}
            print(f"=== {name}: {'passed' if code == 0 else code}, {seconds:.0f} s\n{ending}\n", flush=True)
            results = {"date": datetime.date.today().isoformat(), "dry_run": self.dry, "steps": self.steps}
            (self.folder / "steps.json").write_text(json.dumps(results, indent=1) + "\n")

    def python(self, *arguments: str, kernels: str = "emulation") -> list[str]:
        """A command for Python; in a rehearsal with the stand-in for a GPU."""
        stand_in = ["tests/stand_in.py", kernels] if self.dry else []
        return [sys.executable, *stand_in, *arguments]


def heed_interrupts() -> None:
    """For a step, before it starts: one that a shell has put in the background would ignore them, see :func:`stop`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started: as Ctrl-C, so that it says what it knows, then by force."""
    process.send_signal(signal.SIGINT)
    for what in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        try:
            os.killpg(process.pid, what)
        except ProcessLookupError:
            break
    process.wait()


def has_nvcc() -> bool:
    """Whether setup.py would find one."""
    known = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    known += [str(Path(os.environ[name], "bin", "nvcc")) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    known += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc"))
    return any(path and Path(path).exists() for path in known)


def cannot_build() -> str:
    """What the build would fail for; empty if nothing is known."""
    missing = [name for name in ("setuptools", "pybind11", "cmake", "ninja") if not _version(name)]
    missing = [name for name in missing if not shutil.which(name)]
    if missing:
        return f"the build needs {', '.join(missing)}: pip install {' '.join(missing)}"
    version = _version("setuptools")
    if int(version.split(".")[0]) < SETUPTOOLS:
        return (
            f"setuptools {version} cannot read the licence in pyproject.toml: pip install 'setuptools>={SETUPTOOLS}', "
            "or bring a build along (--prepare, --prebuilt)"
        )
    return ""


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def sources() -> str:
    """A hash of what csdiv._C is built from."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def naive_build(target: str, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command that builds the kernels with groups of one dimension, and its environment."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", target, "--build-temp", "build/naive/temp"]
    return command, environment | {"CMAKE_ARGS": f"{environment['CMAKE_ARGS']} -DCSDIV_GROUP=1 -DCSDIV_ISAS=baseline"}


BUILD = {"CSDIV_CUDA": "on", "CMAKE_ARGS": "-DCMAKE_CUDA_FLAGS=-lineinfo"}
"""Environment of the build; compute-sanitizer names lines then."""


def prepare(folder: Path) -> None:
    """Builds what ``--prebuilt`` takes."""
    if reason := cannot_build():
        sys.exit(reason)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder / "plain"),
        "--build-temp",
        "build/plain",
    ]
    for run, environment in ((command, BUILD), naive_build(str(folder / "naive"), BUILD)):
        subprocess.run(run, cwd=ROOT, env=os.environ | environment, check=True)
    (folder / "sources").write_text(sources())


def take(folder: Path, csdiv: Path, naive: Path) -> str:
    """Copies a build that was carried along to where it is used; why not, or nothing."""
    module = folder / "plain" / "csdiv" / f"_C{SUFFIX}"
    if not module.exists():
        found = ", ".join(path.name for path in module.parent.glob("_C.*")) or "nothing"
        return f"{module} is not there: {found} is"
    if (folder / "sources").read_text() != sources():
        return f"{folder} was built from other sources"
    for source, target in ((module, csdiv), (folder / "naive" / "csdiv" / f"_C{SUFFIX}", naive)):
        if source.exists():
            target.mkdir(parents=True, exist_ok=True)
            for stale in target.glob("_C.*"):
                stale.unlink()
            shutil.copy(source, target)
    return ""


def build(check: Check, prebuilt: Path | None) -> bool:
    """csdiv._C for this GPU; whether there is one."""
    if prebuilt:
        targets = (check.folder / "rehearsed", check.folder / "rehearsed") if check.dry else (ROOT / "csdiv", NAIVE)
        reason = take(prebuilt, *targets)
        check.record("prebuilt", reason or 0, 0.0, "")
        if not reason:
            return True
    if check.dry:
        return True
    if reason := cannot_build():
        check.record("build", reason, 0.0, "")
        return False
    if not has_nvcc():
        print("skipped: the CUDA kernels, for there is no nvcc")
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    return check.step("build", command, 150, BUILD if has_nvcc() else {"CSDIV_CUDA": "off"})


def contract(check: Check, name: str, selection: str, limit: float) -> None:
    """The contract on the backends that ``selection`` names."""
    if not (find_spec("pytest") and find_spec("hypothesis")):
        print(f"skipped: {name}, which needs pytest and hypothesis")
        return
    tests = [f"tests/test_{test}.py" for test in (DRY_TESTS if check.dry else TESTS)]
    options = ["-q", "-rfE", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider"]
    options += ["-p", "stand_in"] if check.dry else []
    if find_spec("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    command = [sys.executable, "-m", "pytest", *options, *tests, "-k", selection]
    paths = os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    check.step(name, command, limit, {"CI": "1", "PYTHONPATH": paths}, lines=40)


def sanitize(check: Check, tool: str) -> None:
    """Every entry under a tool of compute-sanitizer; the PTX machine in its place in a rehearsal."""
    device = ("--device", "cpu") if check.dry else ()
    entries = check.python("-m", "bench.every_entry", *device, kernels="ptx")
    if check.dry:
        check.step(tool, entries, 120)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        print(f"skipped: {tool}, for compute-sanitizer is not on PATH nor at {sanitizer}")
        return
    # initcheck has to see what the kernels of torch write
    only = [] if tool == "initcheck" else ["--kernel-name", "kns=csdiv"]
    command = [sanitizer, "--tool", tool, *only, "--error-exitcode", "9", *entries]
    passed = check.step(tool, command, 100, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    if not passed and check.steps[tool]["ended"] == 9 and not of_csdiv(check.folder / f"{tool}.log"):
        check.record(tool, 0, 0.0, "the errors are not those of csdiv's kernels")


def of_csdiv(log: Path) -> bool:
    """Whether compute-sanitizer found something in a kernel of csdiv."""
    return bool(re.search(r"^=+\s+(?:at|in) .*csdiv", log.read_text(errors="replace"), re.MULTILINE))


EMULATION = "import sys; sys.path[:0] = ['.', 'tests']; import emulation, ptx; emulation.build(ptx.FOLDER)"


def first_half(check: Check, pool: ThreadPoolExecutor, prebuilt: Path | None) -> bool:
    """What says whether the kernels are right; whether there is something to time."""
    wheels = [str(wheel) for wheel in sorted((ROOT / "build" / "wheels").glob("*.whl"))]  # of peers, carried along
    if wheels and not check.dry:
        check.step("wheels", [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", *wheels], 60)
    if not build(check, prebuilt):
        return False
    if check.dry:
        check.step("emulation", [sys.executable, "-c", EMULATION], 200)
        check.start = time.monotonic()  # which is no part of what is rehearsed
    available = "import csdiv; print(csdiv.backend_status()['cuda']); csdiv.warmup({}backend='cuda')"
    command = check.python("-c", available.format("'cpu', " if check.dry else ""))
    if not check.step("available", command, 60):
        contract(check, "triton", "gpu_triton", HALVES_S[0])
        return True
    if not check.dry and has_nvcc() and not list(NAIVE.glob("_C.*")):  # without it the table lacks a row
        run, environment = naive_build("build/naive", BUILD)
        pool.submit(check.step, "naive", run, 150, environment)
    for module in (ROOT / "build" / "emulation").glob("csdiv_emulation.*.so") if check.dry else ():
        DRY_NAIVE.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, DRY_NAIVE)
    check.step("quick", bench(check, "quick", "--alone", "--cases", *QUICK), 60, lines=40)
    others = [pool.submit(sanitize, check, tool) for tool in (SANITIZERS[:1] if check.dry else SANITIZERS)]
    contract(check, "cuda", "(gpu or test_cuda) and not gpu_triton", 100)
    for other in others:
        other.result()
    contract(check, "triton", "gpu_triton and vectors and diagonal" if check.dry else "gpu_triton", HALVES_S[0])
    return True


def bench(check: Check, name: str, *options: str) -> list[str]:
    """The command for the benchmark."""
    rounds = "1" if check.dry else "5"
    dry = ("--dry-run",) if check.dry else ()
    output = str(check.folder / f"{name}.json")
    return check.python("-m", "bench", "gpu", "--rounds", rounds, *options, *dry, "--output", output)


def second_half(check: Check) -> None:
    """What says how fast they are."""
    check.step("bench", bench(check, "gpu"), HALVES_S[1], lines=150, half=1)
    if check.dry:
        return
    if find_spec("lightning") and find_spec("sklearn"):
        swap = check.python("-m", "bench", "swap-in", "--rounds", "3", "--output", str(check.folder / "swap_in.json"))
        check.step("swap_in", swap, 120, lines=40, half=1)
    else:
        print("skipped: the training step, which needs the extra 'train'")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="build what --prebuilt takes, and nothing else")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="take the build in this folder")
    options = parser.parse_args(arguments)
    if options.prepare:
        return prepare(options.prepare.resolve())
    folder = Path(os.environ.get("OUT") or ROOT / "build" / ("gpu-dry-run" if options.dry_run else "gpu-check"))
    check = Check(folder.resolve(), options.dry_run)
    check.folder.mkdir(parents=True, exist_ok=True)
    for earlier in ("quick.json", "gpu.json"):
        (check.folder / earlier).unlink(missing_ok=True)
    if not check.dry and not (shutil.which("nvidia-smi") and check.step("gpu", ["nvidia-smi"], 60)):
        sys.exit("no GPU: nvidia-smi is not there, or sees none")
    with ThreadPoolExecutor(len(SANITIZERS) + 1) as pool:
        able = first_half(check, pool, options.prebuilt)
    if able:
        second_half(check)
    failed = [name for name, step in check.steps.items() if not step["passed"]]
    print("failed:", ", ".join(failed) or "nothing")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
