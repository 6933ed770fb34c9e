"""What is for a rented GPU, without one: steps and their limits, builds that are carried along, a rehearsal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import csdiv._C as _C
from bench import gpu, gpu_check
from bench.cases import GPU_CASES
from bench.gpu_check import Check

ROOT = Path(__file__).resolve().parents[1]


def test_a_step_that_fails_or_hangs_is_reported_and_the_next_one_runs(tmp_path: Path, capsys) -> None:
    check = Check(tmp_path)
    assert check.step("fine", [sys.executable, "-c", "print(6 * 7)"], 60)
    assert not check.step("broken", [sys.executable, "-c", "raise SystemExit('broken')"], 60)
    assert not check.step("endless", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert not check.step("absent", ["no-such-command"], 60)
    printed = capsys.readouterr().out
    for words in ("fine: passed", "42", "broken: 1", "endless: still running after 1 s", "No such file"):
        assert words in printed
    assert (tmp_path / "fine.log").read_text() == "42\n"
    written = json.loads((tmp_path / "steps.json").read_text())
    assert {name: step["passed"] for name, step in written["steps"].items()} == {
        "fine": True,
        "broken": False,
        "endless": False,
        "absent": False,
    }


def test_no_step_begins_after_the_end_of_its_half(tmp_path: Path, capsys) -> None:
    first, second = gpu_check.HALVES_S
    check = Check(tmp_path, start=time.monotonic() - first - 1)
    command = [sys.executable, "-c", "print(6 * 7)"]
    assert not check.step("late", command, 60)
    assert f"late: not run: {first} s have passed" in capsys.readouterr().out
    assert check.step("in time", command, 60, half=1)
    assert second <= 480


ENDLESS = """
import time
import pytest
@pytest.mark.parametrize("k", [0, 1])
def test_one(k):
    assert k
def test_other():
    time.sleep(60)
"""


@pytest.mark.parametrize("in_background", [False, True])
def test_tests_that_take_too_long_say_what_has_failed(tmp_path: Path, capsys, in_background: bool) -> None:
    """Also where a shell has put all of it in the background, and so has interrupts ignored."""
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    check = Check(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", str(tmp_path / "test_endless.py")]
    begin = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if in_background else signal.default_int_handler)
    try:
        assert not check.step("endless", command, 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 4 + 2 * gpu_check.GRACE_S
    printed = capsys.readouterr().out
    assert "1 failed, 1 passed" in printed
    assert "test_one[0]" in printed


def test_what_ignores_signals_is_ended(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.5)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    begin = time.monotonic()
    assert not Check(tmp_path).step("deaf", [sys.executable, "-c", code], 1)
    assert time.monotonic() - begin < 20


def test_a_build_carried_along_is_taken_if_it_is_of_these_sources(tmp_path: Path) -> None:
    folder, target, naive = tmp_path / "carried", tmp_path / "csdiv", tmp_path / "naive"
    assert "is not there: nothing is" in gpu_check.take(folder, target, naive)
    for name in ("plain", "naive"):
        (folder / name / "csdiv").mkdir(parents=True)
        (folder / name / "csdiv" / f"_C{gpu_check.SUFFIX}").write_text(name)
    (folder / "sources").write_text("others")
    assert "other sources" in gpu_check.take(folder, target, naive)
    (folder / "sources").write_text(gpu_check.sources())
    target.mkdir()
    (target / "_C.stale.so").touch()
    assert gpu_check.take(folder, target, naive) == ""
    assert [path.name for path in target.iterdir()] == [f"_C{gpu_check.SUFFIX}"]
    assert (naive / f"_C{gpu_check.SUFFIX}").read_text() == "naive"


@pytest.mark.parametrize(("version", "reason"), [("70.2.0", "setuptools 70.2.0 cannot read"), ("77.0.3", "")])
def test_setuptools_that_cannot_build_are_noticed(version: str, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "_version", lambda name: version)
    assert gpu_check.cannot_build().startswith(reason)
    assert bool(gpu_check.cannot_build()) == bool(reason)
    monkeypatch.setattr(gpu_check, "_version", lambda name: "")
    assert "the build needs setuptools" in gpu_check.cannot_build()


def test_the_build_asks_for_setuptools_that_can() -> None:
    assert f"setuptools>={gpu_check.SETUPTOOLS}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("=========     at void csdiv::cuda::(anonymous namespace)::pack_kernel<float>(...)+0x3d0 in pack.cu:80", True),
        ("=========     at void at::native::vectorized_elementwise_kernel<...>(...)+0x3d0", False),
        ("=========     Host Frame: run_in in csdiv/_C.so", False),
    ],
)
def test_errors_of_other_libraries_are_told_apart(line: str, found: bool, tmp_path: Path) -> None:
    log = tmp_path / "initcheck.log"
    log.write_text(f"========= COMPUTE-SANITIZER\n{line}\n")
    assert gpu_check.of_csdiv(log) == found


def test_two_builds_of_the_module_in_one_process(tmp_path: Path) -> None:
    """The kernels and those with groups of one dimension are timed beside each other."""
    copy = shutil.copy(_C.__file__, tmp_path)
    other = gpu.Naive(Path(copy), torch.device("cpu"))._native
    assert other is not _C
    assert other.__file__ != _C.__file__
    for module in (other, _C):
        assert module.cpu_arithmetic(10, module.Arithmetic.BOTH, 1) > 0


@pytest.mark.slow
def test_the_whole_in_a_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, "bench/gpu_check.py", "--dry-run"]
    environment = os.environ | {"OUT": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert steps["dry_run"]
    assert set(steps["steps"]) == {"emulation", "available", "quick", "memcheck", "cuda", "triton", "bench"}
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["dry_run"]
    assert len({record["case"] for record in results["records"]}) == len(GPU_CASES)
