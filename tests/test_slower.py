"""csdiv is no slower than any peer in the committed run, but where docs/benchmarks.md tells why."""

import json
from pathlib import Path

import pytest

from bench import slower
from bench.peers import Floor

ROOT = Path(__file__).resolve().parent.parent
RECORDS = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["records"]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def test_no_peer_is_faster_without_a_reason() -> None:
    assert slower.unexplained(RECORDS, PAGE) == []


def test_each_row_of_the_page_is_needed() -> None:
    rows = slower.lines(RECORDS)[2:]
    for (case, direction), row in zip(slower.faster_peers(RECORDS), rows, strict=True):
        assert slower.unexplained(RECORDS, PAGE.replace(f"{row}\n", "")) == [f"{case}, {direction}"]


def test_reasons_are_of_cases_that_need_one() -> None:
    assert set(slower.SLOWER) <= set(slower.faster_peers(RECORDS))


def record(provider: str, ms: float | None, case: str = "1x2x3", direction: str = "forward") -> dict[str, object]:
    return {"case": case, "direction": direction, "provider": provider} | ({} if ms is None else {"median_ms": ms})


MADE_UP = [
    record("csdiv cpu", 2.0),
    record("eager", 3.0),
    record("torch.compile", 1.0),
    record("KeOps", None),
    record("csdiv cpu", 2.0, direction="forward + backward"),
    record("eager", 2.0, direction="forward + backward"),
    record(Floor.name, 0.1, direction="forward + backward"),
]


def test_a_faster_peer_needs_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a peer of the same time nor what computes nothing does."""
    monkeypatch.setattr(slower, "SLOWER", {("1x2x3", "forward"): "torch.compile sees that K = 2"})
    rows = slower.lines(MADE_UP)
    assert rows[2:] == ["| 1x2x3 | forward | torch.compile | 2.00 | torch.compile sees that K = 2 |"]
    page = "\n".join(["# Page", f"## {slower.TITLE}", "", *rows, "", "## Next", ""])
    assert slower.unexplained(MADE_UP, page) == []
    without = page.replace(rows[2], "")
    assert slower.unexplained(MADE_UP, without) == ["1x2x3, forward"]
    assert slower.unexplained(MADE_UP, without + rows[2]) == ["1x2x3, forward"]  # in another section
    monkeypatch.setattr(slower, "SLOWER", {})
    unfounded = "\n".join([f"## {slower.TITLE}", *slower.lines(MADE_UP)])
    assert slower.unexplained(MADE_UP, unfounded) == ["1x2x3, forward"]
    assert slower.lines([record("csdiv cpu", 1.0), record("eager", 1.5)]) == ["In no case."]


def test_a_case_without_csdiv_is_an_error() -> None:
    with pytest.raises(ValueError, match="csdiv has no time"):
        slower.faster_peers([*MADE_UP, record("csdiv cpu", None, "4x5x6"), record("eager", 1.0, "4x5x6")])
