"""The benchmarks: what they measure themselves, and that what is committed is what they wrote."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_static import with_kernels

import csdiv
from bench import ab, accuracy, compare, gpu, instructions, limits, measure, report, static, step, tune
from bench.__main__ import main as bench_main
from bench.cases import CPU_CASES, DIRECTIONS, GPU_CASES, Case, make_inputs
from bench.peers import (
    ChunkedEager,
    Compiled,
    Csdiv,
    Eager,
    EagerHandDerived,
    HandDerived,
    Provider,
    ScikitLearn,
    Textbook,
    TorchDistributions,
    TorchDistributionsPointwise,
    providers,
)
from bench.timing import Timing, interleave
from csdiv.kernels import configurations

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "accuracy.json"


@pytest.mark.parametrize("group", list(accuracy.GROUPS))
def test_the_smallest_case_of_a_group_is_within_its_budget(group: str) -> None:
    case = min((case for case in accuracy.cases() if case.group == group), key=lambda case: case.n * case.m * case.dim)
    record = accuracy.measure(case)
    assert 0.0 < record["share_of_budget"] <= 1.0
    assert record["csdiv"]["value"] <= 1e-5 * max(1.0, abs(record["value"]))
    assert all(record["csdiv"][name] <= 3e-5 for name in accuracy.INPUTS) or group == accuracy.NEAR_ZERO


def test_committed_errors_are_within_their_bounds() -> None:
    records = json.loads(COMMITTED.read_text())["records"]
    assert [r["label"] for r in records] == [case.label for case in accuracy.cases()]
    for record in records:
        assert record["share_of_budget"] <= 1.0, record["label"]
        assert all(math.isfinite(x) for x in record["csdiv"].values()), record["label"]
        if record["group"] == accuracy.NEAR_ZERO:
            assert record["csdiv"]["value"] <= accuracy.near_zero_bound(record["dim"]), record["label"]
        else:
            assert all(record["csdiv"][name] <= 3e-5 for name in accuracy.INPUTS), record["label"]


def test_accuracy_page_is_that_of_the_committed_results() -> None:
    committed = json.loads(COMMITTED.read_text())
    assert (ROOT / "docs" / "accuracy.md").read_text() == accuracy.markdown(committed["records"], committed["machine"])


KINDS = [Case(17, 13, 3, "", entry) for entry in ("rows", "self", "regularizer", "log_prob")]
KINDS += [
    Case(5, 4, 3, "", "divergence", 6),
    Case(1, 4, 3, "", "pointwise", 6),
    Case(1, 4, 3, "", "pointwise", 6, "full"),
    *(Case(9, 8, 5, "", structure=name) for name in ("spherical", "tied", "full")),
]


@pytest.mark.parametrize("case", KINDS, ids=[case.name for case in KINDS])
def test_providers_compute_the_same(case: Case) -> None:
    inputs = make_inputs(case)
    everyone: list[Provider] = [Csdiv("cpu", case.entry), Eager(case.entry)]
    if case.entry != "pointwise":
        everyone.append(ChunkedEager(case.entry, chunk_bytes=99))
    if case.structure != "full" or case.entry == "pointwise":
        everyone.append(EagerHandDerived(case.entry, case.structure))
    everyone += {
        "rows": [HandDerived()] if case.structure == "diagonal" else [],
        "regularizer": [Textbook()],
        "log_prob": [ScikitLearn(), TorchDistributions()],
        "pointwise": [TorchDistributionsPointwise()],
    }.get(case.entry, [])
    for backward in (False, True):
        truth = measure.exact(case, inputs, backward)
        for provider in everyone:
            if not backward and DIRECTIONS[0] in provider.directions:
                assert measure.relative_error([provider.forward(inputs)], truth) <= 1e-6, provider.name
            if backward and DIRECTIONS[1] in provider.directions:
                assert measure.relative_error(provider.forward_backward(inputs), truth) <= 1e-5, provider.name


def test_a_wrong_provider_gets_no_time_and_a_large_one_no_memory(monkeypatch) -> None:
    class Wrong(Eager):
        name = "wrong"

        def forward(self, inputs: list) -> object:
            return super().forward(inputs) * 1.001

    case = Case(30, 20, 4, "")
    monkeypatch.setattr(measure, "free_bytes", lambda device: case.elements)
    records = measure.run_case(case, [Csdiv("cpu"), Wrong(), Compiled()], 3, directions=("forward + backward",))
    table = measure.markdown(records).splitlines()
    assert [("median_ms" in record) for record in records] == [True, False, False]
    assert "| csdiv cpu |" in table[2]
    assert "| 1.0 |" in table[2]
    assert "needs 0 GiB" in table[3]
    records = measure.run_case(case, [Csdiv("cpu"), Wrong()], 3, directions=("forward",))
    assert "refused: error 1.0e-03 exceeds 3e-05" in measure.markdown(records).splitlines()[3]


def test_names_of_cases_differ() -> None:
    assert len({case.name for case in CPU_CASES}) == len(CPU_CASES)


def test_two_results_side_by_side(tmp_path: Path) -> None:
    for name, ms in (("before", 2.0), ("after", 3.0)):
        record = {"case": "1x2x3", "direction": "forward", "provider": "csdiv cpu", "median_ms": ms}
        (tmp_path / f"{name}.json").write_text(json.dumps({"records": [record, {"case": "of another kind"}]}))
    table = compare.markdown(tmp_path / "before.json", tmp_path / "after.json").splitlines()
    assert table[2] == "| 1x2x3 | forward | csdiv cpu | 2 | 3 | 1.50 |"
    (tmp_path / "suite.json").write_text(json.dumps({"benchmarks": [{"name": "a", "stats": {"median": 0.5}}]}))
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.markdown(tmp_path / "before.json", tmp_path / "suite.json")


def test_two_builds_in_turns(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ab, "BLOCK_US", 50.0)
    python = Path(sys.executable)
    with pytest.raises(RuntimeError, match=f"not from {tmp_path}"):
        ab.Build(tmp_path, python)
    builds = ab.Build(Path(csdiv.__file__).parents[1], python, 1), ab.Build(Path(csdiv.__file__).parents[1], python, 1)
    records = [record for case in ab.CASES[:6] for record in ab.run_case(case, builds, 3, tmp_path)]
    for build in builds:
        assert build.about["threads"] == 1
        build.close()
    assert all(0.0 < r["lower"] <= r["ratio"] <= r["upper"] for r in records)
    assert len(ab.markdown(records).splitlines()) == 2 + 11
    assert len({case.name for case in ab.CASES}) == len(ab.CASES)
    assert ab.interval([1.0, 9.0, 1.0], [2.0, 18.0, 2.0]) == (2.0, 2.0)


def test_every_peer_has_a_colour_in_the_figures() -> None:
    """A figure is drawn last, after minutes of measurement."""
    names = {provider.name for case in CPU_CASES for provider in providers(case)}
    assert names <= set(report.COLOURS)


def test_benchmarks_page_is_that_of_the_committed_results() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page()
    assert all((ROOT / "docs" / "images" / f"bench-{name.lower()}.png").is_file() for name in report.FIGURES)


# A training step, and counts of instructions


def plain(means: torch.Tensor, log_variances: torch.Tensor, prior: csdiv.nn.GaussianMixturePrior) -> torch.Tensor:
    mixture = prior.means, prior.log_variances.exp(), prior.logits.log_softmax(-1)
    return step.regularizer(means, log_variances, *mixture)


def test_training_steps_are_timed_if_both_divergences_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(step.LOSSES, step.COMPILED, lambda: plain)
    records = step.run_size(4, 3, 1)
    assert [r["regularizer"] for r in records] == list(step.LOSSES)
    assert all(r["median_ms"] > 0.0 for r in records)
    assert len(step.markdown(records).splitlines()) == 2 + len(step.LOSSES)
    monkeypatch.setitem(step.LOSSES, step.COMPILED, lambda: lambda *x: plain(*x) + 1.0)
    with pytest.raises(ArithmeticError, match="losses at K = 4"):
        step.run_size(4, 3, 1)


def test_instructions_are_read_from_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calls.1").write_text("events: Ir\nsummary: 1234\n\nfn=(1)\n0 1234\n\ntotals: 1234\n")
    assert instructions.total(tmp_path / "calls.1") == 1234
    assert "| a | forward | 1,234 |" in instructions.markdown(
        [{"call": "a", "direction": "forward", "instructions": 1234}]
    )
    for _, _, call in instructions.calls():
        call()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs valgrind"):
        instructions.run()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_gradients_take_instructions() -> None:
    found = {(r["call"], r["direction"]): r["instructions"] for r in instructions.run()}
    for case in instructions.CASES[1:]:
        assert 1e4 < found[case.name, DIRECTIONS[0]] < found[case.name, DIRECTIONS[1]] < 1e7


def test_calls_take_turns_and_the_device_is_waited_for() -> None:
    order: list[str] = []
    calls = [lambda name=name: order.append(name) for name in "ab"]
    timings = interleave(calls, rounds=3, wait=lambda: order.append("|"))
    assert [timing.count for timing in timings] == [3, 3]
    assert "".join(order).startswith("|a|b|a")
    assert order[-1] == "|"


def test_cases_shrink_to_the_memory_there_is() -> None:
    (large,) = (case for case in GPU_CASES if case.name == "1024x100000x64")
    assert gpu.fitting(large, 80 * 2**30) == large
    small = gpu.fitting(large, 2**30)
    assert small.name == "256x25000x64"
    assert gpu.fitting(large, 0).name == "1x1x64"


@with_kernels
def test_instructions_are_those_of_the_lanes_that_are_launched(kernels: list[static.Kernel]) -> None:
    kernels = [kernel for kernel in kernels if kernel.architecture == "sm_90a"]
    for dim, most in {8: 14.7, 16: 11.9, 32: 10.5, 40: 14.2, 64: 10.5}.items():
        found = gpu.instructions(kernels, dim)
        assert 6.5 < found["forward"] <= 7.25
        assert 9.0 < found["forward + backward"] - 2 * found["forward"] <= most


@pytest.mark.parametrize(
    ("isa", "pair"), [("avx512", (1 + 7 + 8, 1 + 6 + 7, 2 + 2)), ("avx2", (1 + 11 + 13, 1 + 5 + 7, 4))]
)
def test_operations_of_a_pair_are_counted_as_the_kernels_have_them(isa: str, pair: tuple[int, ...]) -> None:
    four = limits.operations_of_pair(Case(1, 1, 4, ""), False, isa)
    assert (four.multiplications, four.additions, four.integers) == (17 + pair[0], 9 + pair[1], 3 + pair[2])  # pair.h
    spherical = Case(1, 1, 64, "", structure="spherical")
    sums, products = (limits.operations_of_pair(spherical, False, isa, products=way) for way in (False, True))
    assert sums.multiplications - products.multiplications == -2
    assert sums.additions - products.additions == 64 - 4
    for backward in (False, True):
        points, tied = Case(1, 1, 8, "", "log_prob"), Case(1, 1, 8, "", structure="tied")
        assert limits.operations_of_pair(points, backward, isa) == limits.operations_of_pair(tied, backward, isa)


def test_the_arithmetic_that_bounds_are_measured_by_is_done() -> None:
    alone, additions, both = (call() for call in limits.loops(2))
    assert alone == additions
    assert alone % (2 * limits.LOOP_ROUNDS * 12) == 0
    assert both > alone


def test_the_table_of_a_gpu_has_shares_and_refusals() -> None:
    passed = {"median_ms": 2.0, "cold_ms": 2.5, "gel_per_s": 1500.0, "share_of_bound": 0.8, "extra_peak_mib": 3.0}
    passed["predicted_ms"] = 1.75
    head = {"case": "1x2x3", "direction": "forward", "relative_error": 1e-7}
    table = gpu.markdown([head | passed | {"provider": "csdiv cuda"}, head | {"provider": "other"}]).splitlines()
    assert table[2] == "| 1x2x3 | forward | csdiv cuda | 2.000 | 2.500 | 1.750 | 1.500 | 1.0 | 80% | 3.0 | 1.0e-07 |"
    assert "refused: error 1.0e-07" in table[3]


# The tiles of the Triton kernels


def test_a_tuned_table_has_the_format_of_the_one_in_force(monkeypatch) -> None:
    """The best tile of each kernel is the one with the least times among those that were timed in every form and D."""
    fastest, small = configurations.Tile(8, 8, 3), configurations.Tile(2, 4, 3)

    def measure(kernel, form, dtype, dim, tiles, **_):
        times = dict.fromkeys(tiles, 2.0) | {fastest: 1.0} | ({small: 0.5} if dim == 8 else {})
        return {tile: Timing(ms, ms, ms, 1) for tile, ms in times.items()}

    monkeypatch.setattr(csdiv, "backend_status", lambda: {"triton": csdiv.backends.BackendStatus(True, "")})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "measure", measure)
    records, entry = tune.run(rounds=1)
    assert {record["dim"]: record["best"] for record in records} == {8: small, 32: fastest, 128: fastest}
    table = tune.markdown(records)
    assert table.count("(8, 8, 3) | 1.000") + table.count("(2, 4, 3) | 0.500") == len(records)
    head, body = entry.split(" = ")
    assert head == "TILES: Table"
    assert body.startswith("{  # timed on a GPU\n")
    best = eval(body, {"torch": torch, "Tile": configurations.Tile})
    assert list(best) == list(configurations.TILES)
    assert set(best.values()) == {fastest}


def test_candidates_of_tiles_are_valid() -> None:
    """Tiles of rows divide those of columns; tensor cores take 16 rows; a block may have so many threads."""
    for kernel, form, dtype in tune.LAUNCHES:
        tiles = tune.candidates(form, dtype)
        assert len(set(tiles)) == len(tiles) >= 4
        assert configurations.tile_of(kernel, form, dtype) in tiles
        for tile in tiles:
            assert 128 % tile.block_n == 0
            assert not form.endswith("matrix") or tile.block_n >= 16
            assert 32 * tile.num_warps * tile.options["maxnreg"] <= 2**16


def test_tuning_without_a_gpu_says_so(monkeypatch) -> None:
    monkeypatch.setattr(csdiv, "backend_status", lambda: {"triton": csdiv.backends.BackendStatus(False, "no GPU here")})
    with pytest.raises(SystemExit, match=r"^bench tune: no GPU to time the Triton kernels on: no GPU here$"):
        bench_main(["tune"])


@pytest.mark.skipif(csdiv.backend_status()["triton"].available, reason="a GPU")
def test_the_command_for_tuning_fails_without_a_gpu() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "tune"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_the_table_covers_every_launch() -> None:
    """What kernels ask for is what bench tune times, and no tile is there in vain."""
    asked = {
        (kernel, configurations.form_of(structure, dtype, dim, exact=exact), dtype)
        for kernel, exact in (("rows", False), ("rows", True), ("sweep", False))
        for structure in configurations.STRUCTURES
        for dtype in (torch.float32, torch.float64)
        for dim in (1, 15, 16, 10**6)
    }
    assert asked == set(tune.LAUNCHES)
    assert {(kernel, configurations.takes_products(form), dtype) for kernel, form, dtype in asked} == set(
        configurations.TILES
    )
    timed = {launch for launch in tune.LAUNCHES for dim in tune.SIZES if tune.is_taken(*launch, dim)}
    assert timed == asked
