"""The pictures and tables of README and docs, from bench/results and the run of ``make train``: ``make figures``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import csdiv
from csdiv.bench.cases import LARGE_CASES
from csdiv.models.checkpoint import load_model
from csdiv.models.figures import draw_images

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "torch.compile, hand-derived gradients": "#4c72b0",
    "torch.compile": "#55a868",
    "eager, 2 MiB chunks": "#8c8c8c",
    "KeOps": "#c44e52",
}


def density(mixture: csdiv.GaussianMixture, grid: torch.Tensor) -> np.ndarray:
    return mixture.log_prob(grid.reshape(-1, 2)).exp().reshape(grid.shape[:2]).numpy()


def draw_descent(ax: Axes) -> None:
    """Gradient descent on D_CS(p, q) with respect to the means and variances of p; q is three arcs of a spiral."""
    torch.manual_seed(1)
    angle = torch.linspace(0.6, 3.2 * torch.pi, 24)
    target = csdiv.GaussianMixture(
        torch.stack([angle.cos(), angle.sin()], -1) * (0.25 + 0.22 * angle)[:, None], torch.full((1, 1), 0.02)
    )
    means = (0.5 * torch.randn(40, 2)).requires_grad_()
    log_variances = torch.full((40, 2), -1.5, requires_grad=True)
    optimizer = torch.optim.Adam([means, log_variances], lr=0.03)
    path, values = [means.detach().clone()], []
    for _ in range(400):
        optimizer.zero_grad()
        divergence = csdiv.cs_divergence(csdiv.GaussianMixture(means, log_variances.exp()), target)
        divergence.backward()
        optimizer.step()
        path.append(means.detach().clone())
        values.append(divergence.item())
    axis = torch.linspace(-3.2, 3.2, 200)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    ax.contourf(axis, axis, density(target, grid), levels=12, cmap="Blues")
    trace = torch.stack(path).numpy()
    ax.plot(trace[:, :, 0], trace[:, :, 1], color="#c44e52", linewidth=0.5, alpha=0.6)
    ax.plot(*trace[0].T, ".", color="0.3", markersize=3, label="start")
    ax.plot(*trace[-1].T, "o", color="#c44e52", markersize=4, label="after 400 steps")
    ax.set(aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    ax.set_title(f"means of p moved onto q\n$D_{{CS}}$ from {values[0]:.2f} to {values[-1]:.3f} nats")
    ax.legend(frameon=False, fontsize=7, loc="lower left")


def draw_speed(ax: Axes, records: list[dict]) -> None:
    """How many times csdiv's time each peer takes, forward + backward."""
    records = [r for r in records if r["direction"] == "forward + backward" and "median_ms" in r]
    cases = list(dict.fromkeys(r["case"] for r in records))
    own = {r["case"]: r["median_ms"] for r in records if r["provider"].startswith("csdiv")}
    peers = [p for p in COLOURS if any(r["provider"] == p for r in records)]
    for k, peer in enumerate(peers):
        times = {r["case"]: r["median_ms"] for r in records if r["provider"] == peer}
        ratios = [times.get(case, np.nan) / own[case] for case in cases]
        places = np.arange(len(cases)) + (k - (len(peers) - 1) / 2) * 0.8 / len(peers)
        ax.barh(places, ratios, 0.8 / len(peers), color=COLOURS[peer], label=peer)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(cases)), [case.replace("x", " × ") for case in cases])
    ax.invert_yaxis()
    ax.set(xscale="log", xlim=(0.5, None), xlabel="time relative to csdiv (1 = csdiv)", ylabel="N × M × D")
    ax.set_title("value and all gradients\nCPU, 2 threads, float32")
    ax.legend(frameon=False, fontsize=6.5, loc="upper center", bbox_to_anchor=(0.45, -0.22), ncols=1)


def speed_table(results: dict) -> str:
    """Medians in ms per case and provider, forward / forward + backward, as Markdown."""
    medians = {(r["case"], r["provider"], r["direction"]): r.get("median_ms") for r in results["records"]}
    cases, names = (list(dict.fromkeys(r[key] for r in results["records"])) for key in ("case", "provider"))
    names = [name for name in names if name.startswith("csdiv") or name in COLOURS]

    def cell(case: str, name: str) -> str:
        times = (medians.get((case, name, direction)) for direction in ("forward", "forward + backward"))
        return " / ".join("–" if t is None else f"{t:.3g}" if t < 1000 else f"{t:.0f}" for t in times)

    lines = [f"| N × M × D | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {case.replace('x', ' × ')} | {' | '.join(cell(case, name) for name in names)} |" for case in cases]
    machine = results["machine"]
    return "\n".join(
        [
            f"Milliseconds, forward / forward + backward with all gradients, medians of interleaved rounds; float32, "
            f"{machine['threads']} threads of {machine['processor']} ({machine['isa']}), torch {machine['torch']}, "
            f"{results['date']}:",
            "",
            *lines,
        ]
    )


def epochs_table(results: dict) -> str:
    """Time of an epoch per model, as Markdown."""
    machine, records = results["machine"], results["records"]
    lines = [f"| {r['model']} | {r['median_s']:.1f} | {r['ratio_to_vae']:.2f} |" for r in records]
    return "\n".join(
        [
            f"One epoch of {records[0]['samples']} MNIST images, perceptron 784-500-500-20, batches of 256, medians of "
            f"{records[0]['rounds']} interleaved rounds; {machine['threads']} threads of {machine['processor']} "
            f"({machine['isa']}), torch {machine['torch']}, {results['date']} (`csdiv bench epochs --data FOLDER`):",
            "",
            "| model | seconds per epoch | times the VAE's |",
            "|---|---|---|",
            *lines,
        ]
    )


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = path.read_text().split(f"<!-- {name} -->")
    after = rest.split(f"<!-- /{name} -->")[1]
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def main() -> None:
    results = json.loads((ROOT / "bench/results/cpu.json").read_text())
    shown = {
        case.name for case in LARGE_CASES if (case.entry, case.structure) == ("rows", "diagonal") and case.m < 10**5
    }
    results["records"] = [r for r in results["records"] if r["case"] in shown]
    write_between(ROOT / "README.md", "speed", speed_table(results))
    epochs = json.loads((ROOT / "bench/results/epochs_cpu.json").read_text())
    write_between(ROOT / "docs/autoencoder.md", "epochs", epochs_table(epochs))
    figure = Figure((11, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_descent(left)
    draw_speed(middle, results["records"])
    torch.manual_seed(0)
    draw_images(right, load_model(ROOT / "runs/digits").sample(80), (1, 8, 8), 10)
    right.set_title("samples of a CSRAE\ntrained on digits by make train")
    figure.savefig(ROOT / "docs/images/overview.png", dpi=140)
    shutil.copy(ROOT / "runs/digits/figures/overview.png", ROOT / "docs/images/digits.png")


if __name__ == "__main__":
    main()
