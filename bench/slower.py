"""Cases in which a peer is faster than csdiv, and why; a test holds the committed run to this list."""

from __future__ import annotations

from typing import Any

from .peers import Floor

TITLE = "Where csdiv is slower"
_GRAPH = "the peer records no graph: most of the difference is what autograd takes for a Function that computes nothing"
_CALL = "nothing to compute: checks of mixtures and Python take as long as the guards of torch.compile, or longer"
_PRODUCTS = "the peer takes matrix products, in which single dimensions cancel; csdiv adds up squares of differences"
_POINTWISE = "one row for each mixture: reading and transposing the columns takes longer than their arithmetic"
_DOUBLE = "csdiv computes in float64: factors are converted, and gradients back"
SLOWER: dict[tuple[str, str], str] = {
    ("1024x1024x64 spherical", "forward + backward"): _PRODUCTS,
    ("1024x1024x64 tied", "forward"): _PRODUCTS,
    ("1024x1024x64 tied", "forward + backward"): _PRODUCTS,
    ("32x10x10 regularizer", "forward + backward"): _GRAPH,
    ("128x50x32 regularizer", "forward + backward"): _GRAPH,
    ("16x16x2 divergence", "forward"): _CALL,
    ("16x16x2 divergence", "forward + backward"): _GRAPH,
    ("50x50x10 self", "forward + backward"): _GRAPH,
    ("256x100x16", "forward + backward"): _GRAPH,
    ("100x16x2 log_prob", "forward"): _CALL,
    ("100x16x2 log_prob", "forward + backward"): _GRAPH,
    ("1024x1x20x2 pointwise", "forward"): _POINTWISE,
    ("1024x1x20x2 pointwise", "forward + backward"): _POINTWISE,
    ("256x1x20x8 pointwise full", "forward"): _DOUBLE,
    ("256x1x20x8 pointwise full", "forward + backward"): _DOUBLE,
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
