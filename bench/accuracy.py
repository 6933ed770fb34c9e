"""``python -m bench accuracy``: errors of the float32 kernels and of eager torch, both against eager float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

from .cases import tensors_of

INPUTS = ("p means", "p variances", "p log weights", "q means", "q variances", "q log weights")
NEAR_ZERO = "near zero"


class Case(NamedTuple):
    """Mixtures of N and M components, in one of the groups that become tables."""

    group: str
    label: str
    n: int
    m: int
    dim: int
    spread: float = 1.0  # standard deviation of the means, where the components' own is about 1
    shift: float = 0.0  # added to all means, in the same unit
    decades: float = 0.3  # variances are 10^U(-decades, decades)
    scale: float = 1.0  # of all variances

    @property
    def entry(self) -> str:
        return "cs_divergence" if self.group == NEAR_ZERO else "log_overlap"

    def mixtures(self) -> tuple[GaussianMixture, GaussianMixture]:
        """float32; near zero q is p with all parameters changed by a relative 1e-4."""
        g = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"spread": self.spread, "decades": self.decades, "generator": g}
        p, q = (testing.random_mixture(k, self.dim, **options) for k in (self.n, self.m))
        if self.group == NEAR_ZERO:
            q = p.map(lambda t: t * (1.0 + 1e-4 * torch.randn(t.shape, generator=g)))
        return self._moved(p), self._moved(q)

    def _moved(self, p: GaussianMixture) -> GaussianMixture:
        assert p.variances is not None
        return GaussianMixture(
            (p.means + self.shift) * math.sqrt(self.scale), p.variances * self.scale, log_weights=p.log_weights
        )


GROUPS = {
    "components": "log V(p, q), D = 8, N = 4 components against K",
    "dimensions": "log V(p, q), 64 components against 65 in D dimensions",
    "spread": "log V(p, q), 256 components against 257, D = 64: means σ apart, or all of them far from the origin",
    "scale": "log V(p, q), 64 components against 65, D = 16: variances of any size, in the last row of all at once",
    NEAR_ZERO: "D_CS(p, q), q being p with every parameter changed by 1e-4",
}
"""The tables, and what they are of."""


def cases() -> Iterator[Case]:
    for k in (10, 100, 1_000, 10_000, 100_000, 1_000_000):
        yield Case("components", f"K = {k:,}", 4, k, 8)
    for d in (1, 2, 8, 64, 128, 256, 1024):
        yield Case("dimensions", f"D = {d}", 64, 65, d)
    for spread in (1.0, 3.0, 10.0, 30.0, 100.0):
        yield Case("spread", f"means {spread:g} σ apart", 256, 257, 64, spread=spread)
    for shift in (1e2, 1e4):
        yield Case("spread", f"shifted by {shift:g} σ", 256, 257, 64, shift=shift)
    for exponent in (-30, -15, 0, 15, 30):
        yield Case("scale", f"variances × 1e{exponent}", 64, 65, 16, scale=10.0**exponent)
    yield Case("scale", "variances 10^U(−30, 30)", 64, 65, 16, decades=30.0, spread=1e3)
    for k, d in ((10, 2), (1_000, 2), (100, 16), (1_000, 16), (100, 64), (1_000, 64), (100, 256), (100, 1024)):
        yield Case(NEAR_ZERO, f"K = {k:,}, D = {d}", k, k, d)


def near_zero_bound(dim: int) -> float:
    """The largest error of D_CS that csdiv promises for p ≈ q at unit scale, in float32 on the CPU."""
    return 2e-6 * max(1.0, dim / 64)


def _evaluate(case: Case, way: str) -> tuple[Tensor, list[Tensor], tuple[GaussianMixture, GaussianMixture]]:
    """The value, the leaves INPUTS, and the mixtures made of them."""
    dtype = torch.float64 if way == "exact" else torch.float32
    leaves = [t.to(dtype).requires_grad_() for p in case.mixtures() for t in tensors_of(p)]
    sides = testing.mixture_of(*leaves[:3]), testing.mixture_of(*leaves[3:])
    if way == "csdiv":
        return getattr(csdiv, case.entry)(*sides), leaves, sides
    return testing.eager(case.entry, *sides), leaves, sides


def _norm_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def measure(case: Case) -> dict[str, Any]:
    """Absolute error of the value, relative L2 error of each gradient, and the share of its budget that csdiv takes.

    The budget is that of :mod:`csdiv.testing`: twice the error of eager and the derived band, for every element.
    """
    exact, exact_leaves, sides = _evaluate(case, "exact")
    unit = torch.ones((), dtype=torch.float64)
    budgets = [testing.band(case.entry, *sides), *testing.gradient_bands(case.entry, *sides, unit, exact_leaves)]
    truth = [exact.detach(), *torch.autograd.grad(exact, exact_leaves)]
    record: dict[str, Any] = {**case._asdict(), "entry": case.entry, "value": truth[0].item()}
    errors = {}
    for way in ("eager", "csdiv"):
        value, leaves, _ = _evaluate(case, way)
        results = [value.detach(), *torch.autograd.grad(value, leaves)]
        errors[way] = [(a.double() - e).abs() for a, e in zip(results, truth, strict=True)]
        record[way] = {"value": errors[way][0].item()}
        record[way] |= {name: _norm_error(a, e) for name, a, e in zip(INPUTS, results[1:], truth[1:], strict=True)}
    shares = []
    info = torch.finfo(torch.float32)
    for own, eager, band, e in zip(errors["csdiv"], errors["eager"], budgets, truth, strict=True):
        rounding = 0.5 * info.eps * e.abs() + info.tiny
        allowed = band + rounding + torch.where(eager.isfinite(), 2.0 * eager, 0.0)
        # A true gradient beyond the range of float32 is infinite there.
        shares.append(torch.where(e.abs() < 0.25 * info.max, own / allowed, 0.0).max().item())
    record["share_of_budget"] = max(shares)
    return record


def run() -> list[dict[str, Any]]:
    return [measure(case) for case in cases()]


def markdown(records: list[dict[str, Any]], machine: dict[str, str]) -> str:
    """docs/accuracy.md: one table for each group."""
    lines = [
        "# Accuracy",
        "",
        "Errors against eager torch in float64. Each cell is csdiv in float32, then eager torch in float32, in one",
        "run. The error of the value is absolute, in nats, and includes rounding the result to float32; that of a",
        "gradient is ‖error‖ / ‖gradient‖. The budget is twice the error of eager and the derived band",
        "([math.md](math.md); `csdiv.testing` computes it), for the value and every element of every gradient: the",
        "column is the largest share of it that csdiv takes, at most 1. A dash stands for what is not finite.",
        "",
        "Written by `python -m bench accuracy --output bench/results/accuracy.json --markdown docs/accuracy.md`.",
    ]
    for group, title in GROUPS.items():
        near_zero = group == NEAR_ZERO
        # Near zero gradients are differences of nearly equal terms: their relative error says nothing of the kernels.
        names = () if near_zero else INPUTS
        heads = ["", "value", "error of the value", *names, *(["bound"] if near_zero else []), "budget"]
        lines += ["", f"## {group.capitalize()}", "", f"{title}.", "", _row(heads), "|---" * len(heads) + "|"]
        for r in (r for r in records if r["group"] == group):
            cells = [f"{_number(r['csdiv'][name])} / {_number(r['eager'][name])}" for name in ("value", *names)]
            bound = [f"{near_zero_bound(r['dim']):.1e}"] if near_zero else []
            lines.append(_row([r["label"], f"{r['value']:.4g}", *cells, *bound, f"{r['share_of_budget']:.2f}"]))
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in machine.items()), ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(x: float) -> str:
    return f"{x:.1e}" if math.isfinite(x) else "–"
