"""``python -m bench report``: docs/benchmarks.md and its figures, from bench/results alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import instructions, limits, measure, slower, static, step, swap_in
from .cases import CPU_CASES, DIRECTIONS
from .measure import Record
from .peers import Floor

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
COLOURS = {
    "csdiv cpu": "#1f3b73",
    "torch.compile, hand-derived gradients": "#4c72b0",
    "torch.compile": "#55a868",
    "eager, 2 MiB chunks": "#8c8c8c",
    "eager": "#c9a227",
    "KeOps": "#c44e52",
    "loop over components": "#8172b2",
    "scikit-learn, score_samples": "#937860",
    "torch.distributions, 2 MiB chunks": "#da8bc3",
    "torch.distributions": "#c0629f",
    "eager, hand-derived gradients": "#64b5cd",
    "torch.compile, hand-derived gradients in a Function": "#9fbbe0",
    Floor.name: "#000000",
}


def results(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine_line(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['threads']} threads of {machine['processor']} ({machine['isa']}), {machine['compiler']}, "
        f"Python {machine['python']}, torch {machine['torch']}, {result['date']}"
    )


def draw_scaling(time: Axes, memory: Axes, records: list[Record]) -> None:
    """Time and memory over K; a cross where a way does not fit into memory."""
    for name in dict.fromkeys(r["provider"] for r in records):
        own = [r for r in records if r["provider"] == name]
        timed = [r for r in own if "median_ms" in r]
        sizes = [r["components"] for r in timed]
        time.plot(sizes, [r["median_ms"] for r in timed], "o-", color=COLOURS[name], markersize=3.5, label=name)
        memory.plot(sizes, [max(r["extra_peak_mib"], 0.1) for r in timed], "o-", color=COLOURS[name], markersize=3.5)
        for r in own:
            if "skipped" in r:
                time.plot(r["components"], timed[-1]["median_ms"], "x", color=COLOURS[name], markersize=8)
                memory.plot(r["components"], memory.get_ylim()[1], "x", color=COLOURS[name], markersize=8)
    time.set(xscale="log", yscale="log", xlabel="components K", ylabel="ms, forward + backward")
    memory.set(xscale="log", yscale="log", xlabel="components K", ylabel="extra memory, MiB")
    time.set_title("256 rows against K components, D = 16; ×: not enough memory", fontsize=9)
    memory.set_title("beside inputs and gradients", fontsize=9)
    time.legend(frameon=False, fontsize=7)


def draw_speed_ups(ax: Axes, records: list[Record], direction: str) -> None:
    """The peers' times over csdiv's."""
    records = [r for r in records if r["direction"] == direction and "median_ms" in r]
    own = {r["case"]: r["median_ms"] for r in records if r["provider"].startswith("csdiv")}
    for k, case in enumerate(own):
        others = [r for r in records if r["case"] == case and not r["provider"].startswith("csdiv")]
        for r in others:
            ax.plot(r["median_ms"] / own[case], k, "o", color=COLOURS[r["provider"]], markersize=5)
    ax.axvline(1, color=COLOURS["csdiv cpu"], linewidth=1)
    ax.set_yticks(range(len(own)), [name.replace("x", " × ") for name in own], fontsize=7)
    ax.invert_yaxis()
    ax.grid(axis="x", linewidth=0.3)
    ax.set(xscale="log", xlabel="time relative to csdiv (line: csdiv)")
    ax.set_title(direction, fontsize=9)


def draw_limits(cpu: Axes, gpu: Axes, bounds: list[Record], kernels: list[Record]) -> None:
    """Shares of the arithmetic bound on the CPU; what machine code allows on an H200."""
    threads = max(r["threads"] for r in bounds)
    cases = list(dict.fromkeys(r["case"] for r in bounds))
    for k, (direction, colour) in enumerate(zip(DIRECTIONS, ("#4c72b0", "#1f3b73"), strict=True)):
        own = [r for r in bounds if (r["direction"], r["threads"]) == (direction, threads)]
        shares = {r["case"]: 100 * r["share_of_bound"] for r in own}
        places = np.arange(len(cases)) + 0.4 * k - 0.2
        cpu.barh(places, [shares[case] for case in cases], 0.4, color=colour, label=direction)
    cpu.set_yticks(range(len(cases)), [name.replace("x", " × ") for name in cases], fontsize=7)
    cpu.invert_yaxis()
    cpu.axvline(100, color="black", linewidth=0.8)
    cpu.set(xlabel=f"% of the arithmetic bound, {threads} threads")
    cpu.legend(frameon=False, fontsize=7)
    rows = [r for r in kernels if "loop" in r and r["architecture"].startswith("sm_90") and "float" in r["kernel"]]
    axis = np.geomspace(0.1, 3, 100)
    special = static.PROCESSORS * static.CLOCK_GHZ * static.MUFU_LANES / axis / 1e3
    gpu.plot(axis, special, color="#c44e52", label="special functions")
    for per_element, style in ((6.94, "-"), (10.5, "--")):
        issue = static.PROCESSORS * static.CLOCK_GHZ * static.issue_lanes((9, 0)) / per_element / 1e3
        gpu.axhline(issue, color="0.4", linestyle=style, linewidth=1, label=f"issue of {per_element} instructions")
    for loop, marker in (("logits", "o"), ("gradients", "s")):
        points = [(r["special_per_element"], r["bound_tel_per_s"]) for r in rows if r["loop"] == loop]
        gpu.plot(*zip(*points, strict=True), marker, color="#1f3b73", linestyle="none", label=f"hot loops, {loop}")
    gpu.set(xscale="log", yscale="log", xlabel="special functions per element", ylabel="Tel/s, H200 at 1.98 GHz")
    gpu.set_title("ceilings from machine code; no GPU has run this yet", fontsize=9)
    gpu.legend(frameon=False, fontsize=7)


def draw_accuracy(dims: Axes, spread: Axes, records: list[Record]) -> None:
    """Relative errors of values over D, and over how far means are apart, beside eager float32."""
    for ax, group in ((dims, "dimensions"), (spread, "spread")):
        rows = [r for r in records if r["group"] == group]
        for name, colour in (("eager", "#8c8c8c"), ("csdiv", "#1f3b73")):
            errors = [max(r[name]["value"] / max(1.0, abs(r["value"])), 1e-9) for r in rows]
            ax.semilogy(range(len(rows)), errors, "o-", color=colour, markersize=4, label=name)
        ax.set_xticks(range(len(rows)), [r["label"] for r in rows], rotation=45, ha="right", fontsize=7)
        ax.set_title(f"log V(p, q), {group}", fontsize=9)
    dims.set_ylabel("relative error against float64")
    dims.legend(frameon=False, fontsize=7)


def draw_both_directions(left: Axes, right: Axes, records: list[Record]) -> None:
    draw_speed_ups(left, records, "forward")
    draw_speed_ups(right, records, "forward + backward")
    right.set_yticks([])
    names = [name for name in COLOURS if any(r["provider"] == name for r in records) and not name.startswith("csdiv")]
    handles = [right.plot([], [], "o", color=COLOURS[name], label=name)[0] for name in names]
    columns = min(4, len(names))
    right.figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)


FIGURES: dict[str, tuple[float, Callable[..., None], tuple[str, ...]]] = {
    "Speed": (4.6, draw_both_directions, ("cpu",)),
    "Limits": (4.6, draw_limits, ("limits", "static")),
    "Scaling": (4.0, draw_scaling, ("scaling",)),
    "Accuracy": (3.6, draw_accuracy, ("accuracy",)),
}
"""Height in inches, what draws the two panels, and the results that it takes."""


def picture(name: str) -> str:
    return f"![{name}](images/bench-{name.lower()}.png)"


def section(name: str, title: str, lines: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """A section on a result, once that is committed."""
    if not (RESULTS / f"{name}.json").exists():
        return []
    return [f"## {title}", "", *lines(results(name)), ""]


def swapped_in(found: dict[str, Any]) -> list[str]:
    return [
        f"`csdiv bench swap-in`; float32, {machine_line(found)}.",
        swap_in.markdown(found["records"], found["curves"]),
    ]


def training_steps(found: dict[str, Any]) -> list[str]:
    return [
        f"`csdiv bench step`: a perceptron {step.FEATURES}-{step.HIDDEN}-{step.HIDDEN}-D and back, forward, backward",
        "and Adam; without a regularizer, with the closed-form divergence from N(0, I), and with D_CS from a trained",
        f"mixture of K components. Batches of {step.BATCH}, float32, {machine_line(found)}.",
        "",
        step.markdown(found["records"]),
    ]


def instruction_counts(found: dict[str, Any]) -> list[str]:
    return [
        "`csdiv bench instructions`: what one eager call executes by valgrind's count, Python, torch and kernels",
        "together, in one thread. valgrind may know narrower instructions than the machine has: kernels take those.",
        f"Python {found['machine']['python']}, torch {found['machine']['torch']}, {found['date']}.",
        "",
        instructions.markdown(found["records"]),
    ]


def page() -> str:
    """docs/benchmarks.md."""
    cpu, scaling, limit = results("cpu"), results("scaling"), results("limits")
    reasons = {case.name: case.reason for case in CPU_CASES}
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m bench report` from the files in bench/results, each by a run of another suite; no",
        "number here is from anywhere else. A case is one run, in which all that is compared takes turns. Every",
        "provider has to agree with float64 within a relative L2 error of",
        f"{measure.GATE:.0e} before its time is printed. Providers take turns; medians and quartiles of the rounds. An",
        "element is one triple (i, j, d) of the sums as the formula has them.",
        "",
        "## On the CPU",
        "",
        f"float32, {machine_line(cpu)}.",
        "",
        picture("Speed"),
        "",
        "| case | why |",
        "|---|---|",
        *(f"| {name} | {reasons[name]} |" for name in dict.fromkeys(r["case"] for r in cpu["records"])),
        "",
        measure.markdown(cpu["records"]),
        "",
        f"## {slower.TITLE}",
        "",
        *slower.lines(cpu["records"]),
        "",
        "## How near the limit",
        "",
        "The bound counts the vector instructions of the inner loops, exponentials and logarithms included, of a self",
        "term half of the elements. How many multiply-adds, additions, and both at once the machine does is measured",
        "by loops in registers on as many threads, in the same rounds; the scarcest of the three decides. Loads,",
        f"packing and calls count nothing. float32, {machine_line(limit)}.",
        "",
        picture("Limits"),
        "",
        limits.tables(limit["records"], limit["instruction_sets"], limit["divergences"], limit["shared"]),
        "",
        "## Over the number of components",
        "",
        f"float32, {machine_line(scaling)}. A provider that took over a second is not tried ten times larger.",
        *(
            f"log V(p, p) and all its gradients at K = {m['components']:,}, D = {m['dim']} took "
            f"{m['extra_peak_mib']:.0f} MiB beside the inputs."
            for m in scaling["memory"]
        ),
        "",
        picture("Scaling"),
        "",
        measure.markdown(scaling["records"]),
        "",
        *section("step", "What a training step costs", training_steps),
        *section("swap_in", "Swapped into a training step", swapped_in),
        *section("instructions", "Instructions of a call", instruction_counts),
        "## Accuracy",
        "",
        "Tables: [accuracy.md](accuracy.md).",
        "",
        picture("Accuracy"),
        "",
        "## On a GPU",
        "",
        "Not yet measured. What the machine code allows is in [kernels.md](kernels.md); `make gpu-check` measures.",
        "",
    ]
    return "\n".join(lines)


def write() -> None:
    """The page and its figures."""
    (DOCS / "benchmarks.md").write_text(page())
    for name, (height, draw, taken) in FIGURES.items():
        figure = Figure((11, height), layout="constrained")
        draw(*figure.subplots(1, 2), *(results(result)["records"] for result in taken))
        figure.savefig(DOCS / "images" / f"bench-{name.lower()}.png", dpi=130)
