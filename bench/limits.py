"""How far the CPU kernels are from what the machine can do, and what a call costs where there is nothing to compute.

The bound counts the vector arithmetic of the inner loops (csrc/cpu/pair.h, shared_pair.h, simd.h), at the rate that a
matrix product reaches on the same threads: nothing for loads, packing, short vectors at edges and calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

from .cases import Case, make_inputs
from .peers import Csdiv
from .timing import interleave

DIRECTIONS = ("forward", "forward + backward")
PLAIN_CASES = 6
"""The first cases, rows of diagonal covariances: those that instruction sets are compared by."""


@dataclass(frozen=True)
class Operations:
    """Vector instructions: multiplications (fused ones and estimates of reciprocals too), and all other arithmetic."""

    multiplications: float
    others: float

    def __mul__(self, times: float) -> Operations:
        return Operations(self.multiplications * times, self.others * times)

    def __add__(self, more: Operations) -> Operations:
        return Operations(self.multiplications + more.multiplications, self.others + more.others)


LOGIT, LOGARITHM, EXPONENTIAL = Operations(1, 1), Operations(14, 6), Operations(11, 7)
SPHERICAL_PAIR, SPHERICAL_GRADIENT_PAIR = Operations(28, 20), Operations(10, 8)
WEIGHT, PRODUCT_PAIR = Operations(1, 4), Operations(3, 6)
DISTANCE = {"tied": Operations(2, 1), "spherical": Operations(1, 1), "products": Operations(1, 0)}
GRADIENT = {"diagonal": Operations(7, 6), "tied": Operations(4, 5), "spherical": Operations(2, 1)}


def operations_of_pair(case: Case, backward: bool, *, products: bool = False) -> Operations:
    """What one pair of components takes, forward, or with all gradients in the same pass.

    Points count as tied: both kinds have 1 / c beforehand. ``case.structure``: "diagonal", "spherical" or "tied".
    ``products``: whether distances of spherical components are taken from products (csrc/cpu/products.h).
    """
    form = "tied" if case.entry == "log_prob" else case.structure
    found = LOGIT + EXPONENTIAL
    if form == "diagonal":
        groups = [4] * (case.d // 4) + [case.d % 4] * (case.d % 4 > 0)  # k dimensions share a reciprocal
        distance = LOGARITHM + Operations(sum(4 * k + 2 for k in groups), sum(2 * k + 3 for k in groups))
    else:
        distance = DISTANCE["products" if products else form] * case.d + (
            PRODUCT_PAIR if products else Operations(0, 0)
        )
    found += distance
    if form == "spherical":
        found += SPHERICAL_PAIR
    if backward:
        found += WEIGHT + GRADIENT[form] * case.d
        if form == "spherical":
            found += distance + SPHERICAL_GRADIENT_PAIR  # found again, for the gradient of the variance
    return found


def takes_products(case: Case) -> bool:
    """As csrc/cpu/pack.cpp decides it."""
    import csdiv._C as _C

    return case.structure == "spherical" and case.d >= 16 and _C.cpu_isa() == "avx512"


def shares_ports() -> bool:
    """Whether all vector arithmetic goes to the units that multiply: Intel's 512-bit ports. Zen adds elsewhere."""
    import csdiv._C as _C

    cpuinfo = Path("/proc/cpuinfo")
    return _C.cpu_isa() == "avx512" and cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def computed(case: Case) -> float:
    """Elements that are computed: of a self term half."""
    selves = {"self": case.m**2, "regularizer": case.m**2, "divergence": case.n**2 + case.m**2}.get(case.entry, 0)
    return case.elements - 0.5 * case.batch * case.d * selves


DIVERGENCES = (Case(16, 16, 2, "nothing to compute"), Case(1024, 1024, 32, "square, fits the caches"))


def run_bounds(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Gel/s with one thread and with all, and the share of the bound; matrix products are timed in the same rounds.

    Full covariances are left out: what a pair of them takes is not counted here.
    """
    n, before = 1024, torch.get_num_threads()
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    records, shared = [], shares_ports()
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        for case in (c for c in cases if c.structure != "full"):
            inputs, provider = make_inputs(case), Csdiv("cpu", case.entry)
            calls: list[Callable[[], object]] = [
                lambda: torch.mm(a, b, out=out),
                lambda f=provider.forward, x=inputs: f(x),
                lambda f=provider.forward_backward, x=inputs: f(x),
            ]
            for call in calls:
                call()
            product, *timings = interleave(calls, rounds)
            rate = n**3 / product.median_ms / 1e6
            for direction, timing in zip(DIRECTIONS, timings, strict=True):
                speed = computed(case) / timing.median_ms / 1e6
                needed = operations_of_pair(case, direction != DIRECTIONS[0], products=takes_products(case))
                operations = (needed.multiplications + shared * needed.others) / case.d
                records.append(
                    {
                        "case": case.name,
                        "direction": direction,
                        "threads": threads,
                        "multiply_adds_per_ns": rate,
                        "operations_per_element": operations,
                        "gel_per_s": speed,
                        "share_of_bound": speed * operations / rate,
                    }
                )
    torch.set_num_threads(before)
    return records


def run_instruction_sets(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Gel/s with each instruction set that this machine has."""
    import csdiv._C as _C

    widest, records = _C.cpu_isa(), []

    def of(isa: str, function: Callable[[list[Tensor]], object], inputs: list[Tensor]) -> Callable[[], object]:
        def call() -> object:
            _C.cpu_set_isa(isa)
            return function(inputs)

        return call

    names = _C.cpu_isas()[: _C.cpu_isas().index(widest) + 1]
    for case in cases:
        inputs, provider = make_inputs(case), Csdiv("cpu", case.entry)
        ways = [
            (isa, direction, of(isa, function, inputs))
            for isa in names
            for direction, function in zip(DIRECTIONS, (provider.forward, provider.forward_backward), strict=True)
        ]
        for _, _, call in ways:
            call()
        for (isa, direction, _), timing in zip(ways, interleave([way[2] for way in ways], rounds), strict=True):
            speed = computed(case) / timing.median_ms / 1e6
            records.append({"case": case.name, "direction": direction, "isa": isa, "gel_per_s": speed})
    _C.cpu_set_isa(widest)
    return records


class Nothing(torch.autograd.Function):
    """What torch itself takes for a function of six tensors with six gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def run_divergences(rounds: int) -> list[dict[str, Any]]:
    """D_CS with all six gradients, milliseconds."""

    def divergence(*t: Tensor) -> Tensor:
        return csdiv.cs_divergence(GaussianMixture(*t[:3]), GaussianMixture(*t[3:]), backend="cpu")

    def plain(*t: Tensor) -> Tensor:
        return testing.eager("cs_divergence", GaussianMixture(*t[:3]), GaussianMixture(*t[3:]))

    torch.compiler.reset()
    ways: dict[str, Callable[..., Tensor]] = {
        "csdiv cpu": divergence,
        "eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "torch.autograd.Function that computes nothing": Nothing.apply,
    }
    records = []
    for case in DIVERGENCES:
        mu, s, *q = make_inputs(case)
        leaves = [t.requires_grad_() for t in (mu, s, torch.zeros(case.n), *q)]
        calls = [lambda f=f, x=leaves: torch.autograd.grad(f(*x), x) for f in ways.values()]
        for call in calls:
            call()
        for name, timing in zip(ways, interleave(calls, rounds), strict=True):
            records.append({"case": case.name, "provider": name, **timing._asdict()})
    return records


def tables(
    bounds: list[dict[str, Any]], instruction_sets: list[dict[str, Any]], divergences: list[dict[str, Any]]
) -> str:
    """The three results as Markdown."""
    return "\n".join(
        [
            "| case | direction | threads | Gel/s | operations per element | share of the bound |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r['case']} | {r['direction']} | {r['threads']} | {r['gel_per_s']:.2f} "
                f"| {r['operations_per_element']:.1f} | {r['share_of_bound']:.0%} |"
                for r in bounds
            ),
            "\n| case | direction | instruction set | Gel/s |\n|---|---|---|---|",
            *(f"| {r['case']} | {r['direction']} | {r['isa']} | {r['gel_per_s']:.2f} |" for r in instruction_sets),
            "\n| D_CS, forward + backward | provider | median ms | quartiles ms |\n|---|---|---|---|",
            *(
                f"| {r['case']} | {r['provider']} | {r['median_ms']:.3f} | {r['lower_ms']:.3f} to {r['upper_ms']:.3f} |"
                for r in divergences
            ),
        ]
    )
