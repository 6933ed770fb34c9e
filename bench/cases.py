"""What is measured, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from csdiv import GaussianMixture

DIRECTIONS = ("forward", "forward + backward")


class Case(NamedTuple):
    """An entry of :mod:`bench.formulas` for N components against M in D dimensions, ``batch`` times.

    "pointwise" has N = 1, the point of each of ``batch`` mixtures.
    """

    n: int
    m: int
    d: int
    reason: str
    entry: str = "rows"
    batch: int = 1
    structure: str = "diagonal"

    @property
    def name(self) -> str:
        size = "x".join(map(str, (*([self.batch] if self.batch > 1 else []), self.n, self.m, self.d)))
        kinds = [kind for kind in (self.entry, self.structure) if kind not in ("rows", "diagonal")]
        return " ".join([size, *kinds])

    @property
    def elements(self) -> int:
        """Triples of a row, a column and a dimension in all sums of the entry, both halves of a self term."""
        pairs = {
            "rows": self.n * self.m,
            "log_prob": self.n * self.m,
            "pointwise": self.n * self.m,
            "self": self.m**2,
            "divergence": self.n * self.m + self.n**2 + self.m**2,
            "regularizer": self.n * self.m + self.m**2,
        }
        return self.batch * pairs[self.entry] * self.d


LARGE_CASES = (
    Case(128, 500, 40, "one step of a small autoencoder: overheads show"),
    Case(1024, 1024, 32, "square, fits the caches"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(256, 10000, 64, "wide: a batch of codes against a large mixture"),
    Case(10000, 256, 64, "tall: many codes against a small mixture"),
    Case(5000, 5000, 16, "the self term of a large mixture: half of the pairs are enough", "self"),
    Case(1024, 1024, 64, "spherical covariances", structure="spherical"),
    Case(1024, 1024, 64, "tied covariances", structure="tied"),
    Case(2000, 2000, 16, "densities at points", "log_prob"),
    Case(1000, 1000, 3, "full covariances, in registers", structure="full"),
    Case(500, 500, 16, "full covariances, on the stack", structure="full"),
    Case(64, 100_000, 16, "10⁵ components"),
    Case(1000, 100_000, 2, "10⁵ components and a hundredth of 10⁵ points: time grows with the points", "log_prob"),
    Case(4, 1_000_000, 16, "10⁶ components"),
)
SMALL_CASES = (
    Case(32, 10, 10, "the regularizer, so small that a loop over components can be timed", "regularizer"),
    Case(128, 50, 32, "the regularizer of a small autoencoder", "regularizer"),
    Case(256, 50, 10, "the regularizer of a large batch in few dimensions", "regularizer"),
    Case(256, 500, 40, "the regularizer of an autoencoder: a batch, the prior and its self term", "regularizer"),
    Case(16, 16, 2, "the smallest divergence that is of any use", "divergence"),
    Case(16, 16, 1, "a batch of tiny problems, as in distributional reinforcement learning", "divergence", 4096),
    Case(256, 100, 16, "a batch of codes against a prior of usual size"),
    Case(256, 1000, 16, "a batch of codes against a large prior"),
    Case(50, 50, 10, "the self term of a prior of usual size", "self"),
    Case(100, 16, 2, "densities at a few points", "log_prob"),
    Case(1, 20, 2, "a mixture density network: a batch of mixtures with one target each", "pointwise", 1024),
    Case(1, 20, 8, "the same with full covariances", "pointwise", 256, "full"),
)
"""Sizes that people train with: what a call costs beside its arithmetic shows."""
CPU_CASES = (*LARGE_CASES, *SMALL_CASES)
GPU_CASES = (
    Case(8192, 8192, 64, "square, fills the chip"),
    Case(1024, 100000, 64, "a batch of codes against a very large mixture"),
    Case(128, 500, 40, "one step of a small autoencoder: launches show"),
    Case(256, 10000, 64, "a batch of codes against a large mixture"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(1024, 1024, 32, "square, few blocks"),
)
"""What matters most comes first: a rented GPU may be gone before the last."""


def tensors_of(p: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means, variances (the factor of full covariances) and log weights."""
    spread = p.scale_tril if p.variances is None else p.variances
    assert spread is not None
    assert p.log_weights is not None
    return p.means, spread, p.log_weights


def make_inputs(case: Case, seed: int = 0) -> list[Tensor]:
    """p_means, p_variances, q_means, q_variances, q_log_weights, float32; those that the entry takes.

    Full covariances have factors R, S = R Rᵀ, in the place of variances. The regularizer has log variances of p.
    "pointwise" has points (batch, D).
    """
    generator = torch.Generator().manual_seed(seed)
    n, m, d = case.n, case.m, case.d
    batch = (case.batch,) if case.batch > 1 else ()
    tied, width = case.structure == "tied", 1 if case.structure == "spherical" else d
    inputs = [
        torch.randn(*batch, n, d, generator=generator),
        torch.rand(*batch, 1 if tied else n, width, generator=generator) + 0.5,
        torch.randn(*batch, m, d, generator=generator),
        torch.rand(*batch, 1 if tied else m, width, generator=generator) + 0.5,
        torch.randn(*batch, m, generator=generator).log_softmax(-1),
    ]
    if case.structure == "full":
        for k in (1, 3):
            below = torch.randn(*batch, (n, m)[k // 2], d, d, generator=generator).tril(-1) / d
            inputs[k] = below + inputs[k].diag_embed()
    if case.entry == "regularizer":
        inputs[1] = inputs[1].log()
    if case.entry == "pointwise":
        inputs[0] = inputs[0].squeeze(-2)
    left_out = {"self": (0, 1), "log_prob": (1,), "pointwise": (1,)}.get(case.entry, ())
    return [t for k, t in enumerate(inputs) if k not in left_out]
