"""What is measured, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Row log-sum-exps of N components against M in D dimensions: N · M · D elements (el)."""

    n: int
    m: int
    d: int
    reason: str

    @property
    def name(self) -> str:
        return f"{self.n}x{self.m}x{self.d}"

    @property
    def elements(self) -> int:
        return self.n * self.m * self.d


CPU_CASES = (
    Case(128, 500, 40, "one step of a small autoencoder: overheads show"),
    Case(1024, 1024, 32, "square, fits the caches"),
    Case(4096, 4096, 16, "square, few dimensions"),
    Case(2048, 2048, 128, "square, many dimensions"),
    Case(256, 10000, 64, "a batch of codes against a large mixture"),
)


def make_inputs(case: Case, seed: int = 0) -> list[Tensor]:
    """p_means (N, D), p_variances (N, D), q_means (M, D), q_variances (M, D), q_log_weights (M,), float32."""
    generator = torch.Generator().manual_seed(seed)
    n, m, d = case.n, case.m, case.d
    return [
        torch.randn(n, d, generator=generator),
        torch.rand(n, d, generator=generator) + 0.5,
        torch.randn(m, d, generator=generator),
        torch.rand(m, d, generator=generator) + 0.5,
        torch.randn(m, generator=generator).log_softmax(-1),
    ]
