"""What the kernels should take on a GPU: the page is the table, the table is the model's, the model is of this code."""

import json
from pathlib import Path

import emulation
import launches
import ptx
import pytest
import torch
from test_static import with_kernels

import csdiv
from bench import every_entry, executed, predict, static
from bench.cases import DIRECTIONS, GPU_CASES, Case
from csdiv import testing

ROOT = Path(__file__).resolve().parents[1]
SMALL = Case(128, 500, 40, "")
with_ptx = pytest.mark.skipif(bool(ptx.missing()), reason=f"no PTX: {ptx.missing()}")


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return json.loads((predict.RESULTS / "predicted.json").read_text())["records"]


def test_the_page_has_the_table(records: list[dict]) -> None:
    page = (ROOT / "docs" / "kernels.md").read_text()
    between = page[page.index(predict.BEGIN) + len(predict.BEGIN) : page.index(predict.END)]
    assert between.strip() == predict.markdown(records, predict.measured())


def test_every_case_is_predicted_for_every_gpu(records: list[dict]) -> None:
    found = {(r["gpu"], r["case"], r["direction"]) for r in records}
    assert found == {(g.name, c.name, way) for g in predict.GPUS for c in predict.CASES for way in DIRECTIONS}
    assert {case.name for case in GPU_CASES} <= {r["case"] for r in records}
    for r in records:
        assert 0 < r["share_of_bound"] < 1
        assert r["ms"] == max(r["device_ms"], r["host_ms"])
        assert r["device_ms"] == pytest.approx(sum(r["us"].values()) / 1e3, rel=0.01)


def test_measured_times_stand_beside_predicted_ones_but_not_those_of_a_rehearsal(
    records: list[dict], tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    assert predict.measured(path) == {}
    own = {"case": "8192x8192x64", "direction": "forward", "provider": "csdiv cuda", "median_ms": 1.25}
    results = {"records": [own, own | {"provider": "KeOps", "median_ms": 9.0}]}
    path.write_text(json.dumps(results | {"dry_run": True}))
    assert predict.measured(path) == {}
    path.write_text(json.dumps(results | {"dry_run": False}))
    table = predict.markdown(records, predict.measured(path)).splitlines()
    assert [line.endswith("| 1.25 |") for line in table if line.startswith("| 8192x8192x64 |")] == [True, False]
    assert predict.expected("8192x8192x64", "NVIDIA H200")["forward"] > 0
    assert predict.expected("8192x8192x64", "stand-in on the CPU") == {}


@with_kernels
@with_ptx
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_table_is_of_this_code(records: list[dict], kernels: list[static.Kernel], direction: str) -> None:
    """Where this fails after a change of a kernel: python -m bench static --predict --output the JSON file."""
    (now,) = predict.run([SMALL], predict.GPUS[:1], [direction], kernels)
    (then,) = (r for r in records if (r["gpu"], r["case"], r["direction"]) == ("H200", SMALL.name, direction))
    assert now["launches"] == then["launches"]
    assert now["device_ms"] == pytest.approx(then["device_ms"], rel=0.1)


@with_kernels
@with_ptx
def test_instructions_that_are_counted_agree_with_machine_code(kernels: list[static.Kernel]) -> None:
    """PTX that is executed and SASS that is read: of the hot loops the same, within a few per cent."""
    executed.calibration("rows", 40)  # so that the machine has the kernels
    machine = ptx.machine()
    machine.clear_counts()
    p, q = (testing.random_mixture(k, 64) for k in (64, 64))
    csdiv.component_log_overlap(p, q, backend=ptx.NAME)
    (name,) = (name for name in machine.kernels if static.readable(name) == "overlap_lse_forward_kernel<float>")
    opcodes = {row.line: row.name for row in machine.kernels[name].rows}
    lines = machine.counts(name)
    reciprocals = (line.executed for line in lines if opcodes.get(line.line, "").startswith("rcp.approx"))
    (hot,) = {count for count in reciprocals if count}
    counted = sum(line.executed for line in lines if line.executed == hot) * 32 / 64**3
    (loop,) = next(k.loops for k in kernels if k.name == static.readable(name))
    assert counted == pytest.approx(loop.instructions, rel=0.05)


@with_ptx
@pytest.mark.parametrize("entry", ["rows", "self", "divergence", "regularizer"])
def test_launches_are_those_that_the_sweep_is_cut_into(entry: str) -> None:
    executed.install()
    case = Case(8192, 8192, 64, "", entry)
    with launches.recorded(132) as found:
        executed.call(case, emulation.NAME, "forward + backward")
    sweeps = [launch.blocks for launch in found if "backward" in launch.kernel]
    cuts = executed.cuts_of(case, 132)
    assert {cut.phases for cut in cuts} == {len(sweeps)}
    works = [executed.sweep_works(case, cuts, phase) for phase in range(len(sweeps))]
    assert [len(of_phase) for of_phase in works] == sweeps
    tiles = {"rows": 128**2, "self": 64 * 129, "divergence": 128**2 + 128 * 129, "regularizer": 128**2 + 64 * 129}
    assert sum(map(sum, works)) == tiles[entry]  # every tile once


@with_ptx
def test_what_sanitizers_watch_has_phases() -> None:
    executed.install()
    p, q = every_entry.mixtures(every_entry.PHASES, "diagonal", torch.float32, "cpu")
    with launches.recorded(every_entry.PROCESSORS) as found:
        every_entry.gradients(p, q, csdiv.log_overlap(p, q, backend=emulation.NAME))
    assert sum("backward" in launch.kernel for launch in found) > 1
