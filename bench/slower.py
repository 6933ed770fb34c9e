"""Cases in which a peer is faster than csdiv, and why; a test holds the committed run to this list."""

from __future__ import annotations

from typing import Any

from .peers import Floor

TITLE = "Where csdiv is slower"
SLOWER: dict[tuple[str, str], str] = {
    ("32x10x10 regularizer", "forward"): "to be measured again",
    ("32x10x10 regularizer", "forward + backward"): "to be measured again",
}
"""The reason for each case and direction."""


def faster_peers(records: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The records of peers with a median below csdiv's, by case and direction; the fastest first.

    Raises:
        ValueError: a case in which csdiv has no time.
    """
    timed = [r for r in records if "median_ms" in r and r["provider"] != Floor.name]
    own = {(r["case"], r["direction"]): r["median_ms"] for r in timed if r["provider"].startswith("csdiv")}
    if missing := {(r["case"], r["direction"]) for r in records} - set(own):
        raise ValueError(f"csdiv has no time in {sorted(missing)}")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in sorted(timed, key=lambda r: r["median_ms"]):
        where = r["case"], r["direction"]
        if not r["provider"].startswith("csdiv") and r["median_ms"] < own[where]:
            found.setdefault(where, []).append(r)
    return {where: found[where] for where in own if where in found}


def unexplained(records: list[dict[str, Any]], page: str) -> list[str]:
    """Cases and directions with a faster peer that the section of the page has no reason for."""
    section = page.partition(f"## {TITLE}\n")[2].partition("\n## ")[0]
    explained = set[tuple[str, ...]]()
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 5 and cells[4]:
            explained.add(tuple(cells[:2]))
    return [f"{case}, {direction}" for case, direction in faster_peers(records) if (case, direction) not in explained]


def lines(records: list[dict[str, Any]]) -> list[str]:
    """The section: a row for each case and direction with a faster peer."""
    found = faster_peers(records)
    if not found:
        return ["In no case."]
    rows = ["| case | direction | fastest peer | times faster | why |", "|---|---|---|---|---|"]
    own = {(r["case"], r["direction"]): r["median_ms"] for r in records if r["provider"].startswith("csdiv")}
    for (case, direction), (best, *_) in found.items():
        times = own[case, direction] / best["median_ms"]
        why = SLOWER.get((case, direction), "")
        rows.append(f"| {case} | {direction} | {best['provider']} | {times:.2f} | {why} |")
    return rows
