"""``python -m bench compare A.json B.json``: the same measurements twice, of two commits or two machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def medians(path: Path) -> dict[tuple[str, str, str], float]:
    """Milliseconds of each case, direction and provider in a result of this package or of pytest-benchmark."""
    results: dict[str, Any] = json.loads(path.read_text())
    if "benchmarks" in results:  # of pytest-benchmark
        return {(b["name"], "", "csdiv"): 1e3 * b["stats"]["median"] for b in results["benchmarks"]}
    records = [r for r in results["records"] if "median_ms" in r and "provider" in r]
    return {(r["case"], r.get("direction", ""), r["provider"]): r["median_ms"] for r in records}


def markdown(before: Path, after: Path) -> str:
    """A row for what both have.

    Raises:
        ValueError: they have nothing in common.
    """
    old, new = medians(before), medians(after)
    common = [key for key in new if key in old]
    if not common:
        raise ValueError(f"{before} and {after} have no measurement in common")
    lines = [
        f"| case | direction | provider | {before.stem} ms | {after.stem} ms | times |",
        "|---|---|---|---|---|---|",
    ]
    for key in common:
        lines.append(f"| {' | '.join(key)} | {old[key]:.3g} | {new[key]:.3g} | {new[key] / old[key]:.2f} |")
    return "\n".join(lines)
