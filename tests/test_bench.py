"""The benchmarks: what they measure themselves, and that what is committed is what they wrote."""

import json
import math
from pathlib import Path

import pytest

from bench import accuracy

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
