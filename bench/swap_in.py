"""The same training step with a textbook loss and with csdiv: ``csdiv bench swap-in``.

First the proof that nothing but the time changes: loss curves of one CSRAE, from the same weights, batches and noise,
in float64 and in float32, where orders of the same eager sums say how far rounding alone carries a curve. Then time and
peak memory of the step over the number of components. No time is printed unless the curves agree.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csdiv.models.autoencoder import CSRAE
from csdiv.models.data import Dataset, load_data
from csdiv.models.networks import build_networks
from csdiv.nn import GaussianMixturePrior

from .formulas import FORMULAS, Formula, regularizer, rows_in_chunks
from .measure import Record, free_bytes
from .peers import BYTES_PER_ELEMENT, CHUNK_BYTES
from .timing import interleave, peak_mib

HIDDEN, LATENT, BATCH, LEARNING_RATE = 500, 20, 256, 1e-3
STEPS, CURVE_COMPONENTS, SEEDS = 200, 50, 3
TOLERANCE = 1e-9
"""Largest relative difference of two float64 losses within STEPS steps."""
EAGER, CHUNKED, COMPILED, CSDIV = "eager", "eager, 2 MiB chunks", "torch.compile", "csdiv"


class Size(NamedTuple):
    """A number of components and who is tried with it; csdiv comes first."""

    components: int
    providers: tuple[str, ...]


SIZES = (
    Size(50, (CSDIV, EAGER, COMPILED)),
    Size(500, (CSDIV, EAGER, COMPILED)),
    Size(2_000, (CSDIV, EAGER, COMPILED)),
    Size(5_000, (CSDIV, CHUNKED)),
    Size(50_000, (CSDIV,)),
)


class Swapped(CSRAE):
    """CSRAE whose divergence is a formula of :mod:`bench.formulas`."""

    formula: Formula

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        prior = self.prior
        return self.formula(means, log_variances, prior.means, prior.log_variances.exp(), prior.logits.log_softmax(-1))


def reordered(components: bool, dimensions: bool) -> Formula:
    """The textbook loss with its sums over components or dimensions taken backwards."""

    def formula(mu: Tensor, log_s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
        if dimensions:
            mu, log_s, nu, t = (x.flip(-1) for x in (mu, log_s, nu, t))
        if components:
            nu, t, log_b = nu.flip(0), t.flip(0), log_b.flip(0)
        return regularizer(mu, log_s, nu, t, log_b)

    return formula


ORDERS: dict[str, Formula] = {
    EAGER: regularizer,
    "components backwards": reordered(components=True, dimensions=False),
    "dimensions backwards": reordered(components=False, dimensions=True),
    "both backwards": reordered(components=True, dimensions=True),
}


def make_model(num_features: int, num_components: int) -> CSRAE:
    torch.manual_seed(0)
    networks = build_networks("mlp", "bernoulli", (num_features,), LATENT, HIDDEN)
    return CSRAE(*networks, GaussianMixturePrior(num_components, LATENT))


def swapped(model: CSRAE, provider: str) -> CSRAE:
    """A copy of the model with the provider's loss; csdiv's is the model's own."""
    model = copy.deepcopy(model)
    if provider != CSDIV:
        model.__class__ = Swapped
        assert isinstance(model, Swapped)
        model.formula = _formula(provider, model.prior.means)
    return model


def _formula(provider: str, means: Tensor) -> Formula:
    if provider == CHUNKED:
        rows = rows_in_chunks(max(1, CHUNK_BYTES // (means.itemsize * means.numel())))
        return functools.partial(regularizer, rows=rows)
    if provider == COMPILED:
        return torch.compile(FORMULAS["regularizer"], dynamic=False)
    return ORDERS[provider]


def curve(model: CSRAE, x: Tensor, steps: int, seed: int = 0) -> list[float]:
    """The loss of each step, Adam and all; the seed fixes batches and noise, the same for every model."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    losses = []
    for step in range(steps):
        torch.manual_seed(seed * steps + step)
        batch = x[torch.randint(len(x), (BATCH,))].bernoulli()
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def difference(a: list[float], b: list[float]) -> float:
    """The largest |a − b| / |a|; infinite if anything is not finite."""
    largest = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    return largest if math.isfinite(sum(a) + sum(b)) else math.inf


def compare_curves(data: Dataset, device: str = "cpu", steps: int = STEPS, seeds: int = SEEDS) -> Record:
    """How far loss curves part, relative: csdiv's from the eager one, and the eager one's orders from each other.

    float32 curves are chaotic: what rounding starts grows with the steps. So the differences up to each quarter of
    the run are kept, for several seeds of batches and noise.
    """
    x = data.train.x.to(device)
    base = make_model(data.num_features, CURVE_COMPONENTS).to(device)
    double = {name: curve(swapped(base.double(), name), x.double(), steps) for name in (EAGER, CSDIV)}
    quarters = [max(1, steps * quarter // 4) for quarter in (1, 2, 3, 4)]
    base, single = base.float(), []
    for seed in range(seeds):
        curves = {name: curve(swapped(base, name), x, steps, seed) for name in (*ORDERS, CSDIV)}
        own = curves.pop(CSDIV)
        pairs = list(itertools.combinations(curves.values(), 2))
        single += [
            {
                "seed": seed,
                "steps": n,
                "csdiv": max(difference(other[:n], own[:n]) for other in curves.values()),
                "eager_orders": max(difference(a[:n], b[:n]) for a, b in pairs),
            }
            for n in quarters
        ]
    return {
        "data": data.name,
        "steps": steps,
        "components": CURVE_COMPONENTS,
        "first_loss": double[EAGER][0],
        "last_loss": double[EAGER][-1],
        "float64": difference(double[EAGER], double[CSDIV]),
        "float32": single,
    }


def make_step(model: CSRAE, x: Tensor) -> Callable[[], object]:
    """One training step: forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()

    return step


def make_divergence(model: CSRAE, x: Tensor) -> Callable[[], object]:
    """The divergence of that step alone, forward and backward."""
    with torch.no_grad():
        codes = model.encoder(x)

    def divergence() -> None:
        model.zero_grad()
        model.divergence(*(t.requires_grad_() for t in codes)).mean().backward()

    return divergence


def time_steps(size: Size, device: str, rounds: int, num_features: int = 784) -> list[Record]:
    """A record for each provider: milliseconds of the step and of its divergence, and peak memory of the step."""
    torch.compiler.reset()
    base = make_model(num_features, size.components).to(device)
    x = torch.rand(BATCH, num_features, device=device).round()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    records, calls, timed = [], [], []
    for provider in size.providers:
        record: Record = {"components": size.components, "provider": provider}
        records.append(record)
        elements = (BATCH * size.components + size.components**2) * LATENT
        needed = BYTES_PER_ELEMENT * elements if provider in (EAGER, COMPILED) else 0
        if needed > 0.8 * free_bytes(device):
            record["skipped"] = f"needs {needed / 2**30:.0f} GiB"
            continue
        model = swapped(base, provider)
        step, divergence = make_step(model, x), make_divergence(model, x)
        try:
            step()
            divergence()
            wait()
        except torch.OutOfMemoryError as shortage:
            record["skipped"] = str(shortage).splitlines()[0]
            continue
        record["extra_peak_mib"] = round(peak_mib(step, device), 1)
        calls += [step, divergence]
        timed.append(record)
    timings = interleave(calls, rounds, wait)
    for record, step_ms, divergence_ms in zip(timed, timings[::2], timings[1::2], strict=True):
        record.update(step_ms.record(), divergence_ms=divergence_ms.median_ms)
    return records


def run(source: str, rounds: int) -> tuple[list[Record], Record]:
    """The records of all sizes, and the comparison of curves; on the GPU where there is one.

    Raises:
        ArithmeticError: the curves do not agree.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    curves = compare_curves(load_data(source, validation_fraction=0.0), device)
    curves["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if not curves["float64"] <= TOLERANCE:
        raise ArithmeticError(f"float64 losses differ by {curves['float64']:.1e}, more than {TOLERANCE:.0e}")
    return [record for size in SIZES for record in time_steps(size, device, rounds)], curves


def markdown(records: list[dict[str, Any]], curves: dict[str, Any]) -> str:
    """What was compared, the curves' differences, and a row for each provider and number of components."""
    lines = [
        f"{curves['steps']} steps of a CSRAE with K = {curves['components']} on {curves['data']}, the same weights,",
        f"batches and noise: in float64 the losses ({curves['first_loss']:.1f} nats at first,",
        f"{curves['last_loss']:.1f} at last) differ by at most {curves['float64']:.1e}, relative. In float32 every",
        "curve parts from every other, as rounding grows with the steps; the largest relative differences so far:",
        "",
        "| steps | csdiv from eager, each seed | two eager orders of summation, each seed |",
        "|---|---|---|",
    ]
    for steps in dict.fromkeys(r["steps"] for r in curves["float32"]):
        own = [r for r in curves["float32"] if r["steps"] == steps]
        cells = [", ".join(f"{r[name]:.1e}" for r in own) for name in ("csdiv", "eager_orders")]
        lines.append(f"| {steps} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"One step, forward, backward and Adam: perceptron 784-{HIDDEN}-{HIDDEN}-{LATENT}, batch {BATCH}, float32.",
        "",
        "| K | loss | step ms | quartiles ms | times csdiv | divergence ms | share of the step | extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    csdiv_ms: dict[int, float] = {}
    for r in records:
        head = f"| {r['components']:,} | {r['provider']} "
        if "skipped" in r:
            lines.append(f"{head}| {r['skipped']} | | | | | |")
            continue
        ratio = r["median_ms"] / csdiv_ms.setdefault(r["components"], r["median_ms"])
        lines.append(
            f"{head}| {r['median_ms']:.3g} | {r['lower_ms']:.3g} to {r['upper_ms']:.3g} | {ratio:.2f} "
            f"| {r['divergence_ms']:.3g} | {100 * r['divergence_ms'] / r['median_ms']:.0f}% "
            f"| {r['extra_peak_mib']:.0f} |"
        )
    return "\n".join([*lines, "", gain(records)])


def gain(records: list[dict[str, Any]]) -> str:
    """What the smallest and largest number of components that the eager loss was timed with gain, in words."""
    timed = [r for r in records if "median_ms" in r]
    both = {
        k: {r["provider"]: r["median_ms"] for r in timed if r["components"] == k}
        for k in {r["components"] for r in timed}
    }
    ratios = {k: times[EAGER] / times[CSDIV] for k, times in sorted(both.items()) if EAGER in times}
    small, large = min(ratios), max(ratios)
    return (
        f"At K = {small} the step takes {ratios[small]:.2f} times as long with the eager loss: there the networks are "
        f"what costs, and csdiv gains little. At K = {large:,} it is {ratios[large]:.1f} times."
    )
