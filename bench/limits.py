"""How far the CPU kernels are from what the machine can do, and what a call costs where there is nothing to compute.

The bound counts multiplications and fused multiply-adds of the inner loops alone (csrc/cpu/pair.h), at the rate that a
matrix product reaches on the same threads: nothing for additions, loads, exponentials, logarithms and sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

from .cases import Case, make_inputs
from .peers import Csdiv
from .timing import interleave

OPERATIONS = {"forward": 4.5, "forward + backward": 4.5 + 7.0}
"""Multiplications per element: logits, and gradients."""


def computed(case: Case) -> float:
    """Elements that are computed: of a self term half."""
    selves = {"self": case.m**2, "regularizer": case.m**2, "divergence": case.n**2 + case.m**2}.get(case.entry, 0)
    return case.elements - 0.5 * case.batch * case.d * selves


DIVERGENCES = (Case(16, 16, 2, "nothing to compute"), Case(1024, 1024, 32, "square, fits the caches"))


def run_bounds(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Gel/s with one thread and with all, and the share of the bound; matrix products are timed in the same rounds."""
    n, before = 1024, torch.get_num_threads()
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    records = []
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        for case in cases:
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
            for (direction, operations), timing in zip(OPERATIONS.items(), timings, strict=True):
                speed = computed(case) / timing.median_ms / 1e6
                records.append(
                    {
                        "case": case.name,
                        "direction": direction,
                        "threads": threads,
                        "multiply_adds_per_ns": rate,
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
            for direction, function in zip(OPERATIONS, (provider.forward, provider.forward_backward), strict=True)
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
            "| case | direction | threads | Gel/s | share of the bound |\n|---|---|---|---|---|",
            *(
                f"| {r['case']} | {r['direction']} | {r['threads']} | {r['gel_per_s']:.2f} "
                f"| {r['share_of_bound']:.0%} |"
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
