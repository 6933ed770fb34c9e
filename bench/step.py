"""``python -m bench step``: what the training step of a small autoencoder costs with each regularizer.

A perceptron 784-400-400-D and back, batches of 128, Adam; without a regularizer, with the closed-form divergence from
N(0, I), and with D_CS from a trained mixture, by csdiv and by the plain formula under torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import csdiv
from csdiv.nn import GaussianMixturePrior

from .formulas import regularizer
from .measure import GATE, Record
from .timing import interleave

FEATURES, HIDDEN, BATCH, LEARNING_RATE = 784, 400, 128, 1e-3
SIZES = ((10, 10), (50, 32), (500, 40))
"""Components of the prior, and dimensions of the codes."""
Loss = Callable[[Tensor, Tensor, GaussianMixturePrior], Tensor]


def nothing(means: Tensor, log_variances: Tensor, prior: GaussianMixturePrior) -> Tensor:
    return means.new_zeros(())


def standard_normal(means: Tensor, log_variances: Tensor, prior: GaussianMixturePrior) -> Tensor:
    return 0.5 * (means**2 + log_variances.exp() - log_variances - 1.0).sum(-1)


def with_csdiv(means: Tensor, log_variances: Tensor, prior: GaussianMixturePrior) -> Tensor:
    return csdiv.cs_regularizer(means, log_variances, prior)


def compiled() -> Loss:
    """The formula and what leads from the prior's parameters to it, in one graph."""

    @torch.compile(dynamic=False)
    def formula(means: Tensor, log_variances: Tensor, nu: Tensor, log_t: Tensor, logits: Tensor) -> Tensor:
        return regularizer(means, log_variances, nu, log_t.exp(), logits.log_softmax(-1))

    return lambda means, log_variances, prior: formula(
        means, log_variances, prior.means, prior.log_variances, prior.logits
    )


PLAIN, CSDIV, COMPILED = "none", "D_CS, csdiv", "D_CS, torch.compile"
LOSSES: dict[str, Callable[[], Loss]] = {
    PLAIN: lambda: nothing,
    "KL to N(0, I)": lambda: standard_normal,
    CSDIV: lambda: with_csdiv,
    COMPILED: compiled,
}
"""What makes the regularizer of each name."""


class Autoencoder(nn.Module):
    """Codes N(m, diag s) of binary images, and the prior that they may be held to."""

    def __init__(self, components: int, dim: int) -> None:
        super().__init__()
        hidden = (nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.encoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), *hidden, nn.Linear(HIDDEN, 2 * dim))
        hidden = (nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.decoder = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), *hidden, nn.Linear(HIDDEN, FEATURES))
        self.prior = GaussianMixturePrior(components, dim)

    def loss(self, x: Tensor, regularizer: Loss) -> Tensor:
        means, log_variances = self.encoder(x).chunk(2, -1)
        codes = means + (0.5 * log_variances).exp() * torch.randn_like(means)
        distortion = nn.functional.binary_cross_entropy_with_logits(self.decoder(codes), x, reduction="sum") / len(x)
        return distortion + regularizer(means, log_variances, self.prior).mean()


def images(generator: torch.Generator) -> Tensor:
    """Random binary images, a fifth of their pixels set, as in digits."""
    return (torch.rand(BATCH, FEATURES, generator=generator) < 0.2).float()


def make_step(components: int, dim: int, regularizer: Loss) -> tuple[Callable[[], object], Tensor]:
    """One training step, forward, backward and Adam, and the loss of a first one; the same weights for everybody."""
    torch.manual_seed(0)
    model, x = Autoencoder(components, dim), images(torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(x, regularizer)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, step()


def run_size(components: int, dim: int, rounds: int) -> list[Record]:
    """A record for each regularizer.

    Raises:
        ArithmeticError: the two ways to D_CS give different losses.
    """
    torch.compiler.reset()
    steps = {name: make_step(components, dim, make()) for name, make in LOSSES.items()}
    (_, own), (_, other) = (steps[name] for name in (CSDIV, COMPILED))
    if not (own - other).abs() <= GATE * other.abs():
        raise ArithmeticError(f"losses at K = {components}: {own.item():.6f} and {other.item():.6f}")
    timings = interleave([step for step, _ in steps.values()], rounds)
    head = {"components": components, "dim": dim, "batch": BATCH}
    return [{**head, "regularizer": name, **timing.record()} for name, timing in zip(steps, timings, strict=True)]


def run(rounds: int) -> list[Record]:
    return [record for size in SIZES for record in run_size(*size, rounds)]


def markdown(records: list[dict[str, Any]]) -> str:
    """A row for each size and regularizer, with what it adds to the step without one."""
    lines = ["| K | D | regularizer | step ms | quartiles ms | more than without, ms |", "|---|---|---|---|---|---|"]
    without = {r["components"]: r["median_ms"] for r in records if r["regularizer"] == PLAIN}
    for r in records:
        lines.append(
            f"| {r['components']} | {r['dim']} | {r['regularizer']} | {r['median_ms']:.2f} "
            f"| {r['lower_ms']:.2f} to {r['upper_ms']:.2f} | {r['median_ms'] - without[r['components']]:.2f} |"
        )
    return "\n".join(lines)
