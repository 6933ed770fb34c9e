"""How far the CPU kernels are from what the machine can do, and what a call costs where there is nothing to compute.

The bound counts the vector arithmetic of the inner loops (csrc/cpu/kernels: pair.h, structured_pair.h, simd.h), nothing
for loads, packing, short vectors at edges and calls. How many instructions a machine can do is measured in the same
rounds, by loops of multiply-adds, of additions and of both in registers; the scarcest of these decides.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import csdiv
from csdiv import testing

from .cases import DIRECTIONS, Case, make_inputs
from .peers import Csdiv, Floor, Nothing, leaves_of
from .timing import interleave

PLAIN_CASES = 6
"""The first cases, rows of diagonal covariances: those that instruction sets are compared by."""


@dataclass(frozen=True)
class Operations:
    """Vector instructions: multiplications (fused ones too); additions, and what takes their units: comparisons,
    maxima, conversions, permutations, estimates of reciprocals; and shifts and sums of integers."""

    multiplications: float
    additions: float
    integers: float = 0

    def __mul__(self, times: float) -> Operations:
        return Operations(self.multiplications * times, self.additions * times, self.integers * times)

    def __add__(self, more: Operations) -> Operations:
        return Operations(
            self.multiplications + more.multiplications, self.additions + more.additions, self.integers + more.integers
        )


LOGIT, WEIGHT = Operations(1, 1), Operations(1, 3, 1)
EXPONENTIAL = {"avx512": Operations(7, 6, 2), "avx2": Operations(11, 5, 2)}
LOGARITHM = {"avx512": Operations(8, 7, 2), "avx2": Operations(13, 7, 2)}
SPHERICAL_PAIR = {"avx512": Operations(18, 14, 1), "avx2": Operations(27, 18, 5)}
SPHERICAL_GRADIENT_PAIR, PRODUCT_PAIR = Operations(8, 9), Operations(2, 4, 1)
DISTANCE = {"tied": Operations(2, 1), "spherical": Operations(1, 1), "products": Operations(1, 0)}
GRADIENT = {"diagonal": Operations(6, 7), "tied": Operations(4, 5), "spherical": Operations(2, 1)}


def operations_of_pair(case: Case, backward: bool, isa: str, *, products: bool = False) -> Operations:
    """What one pair of components takes, forward, or with all gradients in the same pass.

    Points count as tied: both kinds have 1 / c beforehand. ``case.structure``: "diagonal", "spherical" or "tied".
    ``isa``: other than "avx512", exponentials and logarithms have no tables. ``products``: whether distances of
    spherical components are taken from products (csrc/cpu/kernels/squares.h).
    """
    form, isa = (
        "tied" if case.entry in ("log_prob", "pointwise") else case.structure,
        "avx512" if isa == "avx512" else "avx2",
    )
    found = LOGIT + EXPONENTIAL[isa]
    if form == "diagonal":
        groups = [4] * (case.d // 4) + [case.d % 4] * (case.d % 4 > 0)  # k dimensions share a reciprocal
        distance = LOGARITHM[isa] + Operations(
            sum(4 * k + 1 for k in groups), sum(2 * k + 1 for k in groups), 3 * len(groups)
        )
    elif products:
        distance = DISTANCE["products"] * case.d + PRODUCT_PAIR
    else:
        distance = DISTANCE[form] * case.d
    found += distance
    if form == "spherical":
        found += SPHERICAL_PAIR[isa]
    if backward:
        found += WEIGHT + GRADIENT[form] * case.d
        if form == "spherical":
            found += distance + SPHERICAL_GRADIENT_PAIR  # found again, for the gradient of the variance
    return found


def takes_products(case: Case) -> bool:
    """As csrc/cpu/sweep/pack.cpp decides it."""
    import csdiv._C as _C

    return case.structure == "spherical" and case.d >= 16 and _C.cpu_isa() == "avx512"


LOOP_ROUNDS = 200_000
"""Of the loops in registers: milliseconds, so that waking threads does not count."""


def loops(threads: int) -> list[Callable[[], int]]:
    """Calls that return how many numbers they computed: by multiply-adds, by additions, by both at once."""
    import csdiv._C as _C

    kinds = (_C.Arithmetic.MULTIPLY_ADDS, _C.Arithmetic.ADDITIONS, _C.Arithmetic.BOTH)
    return [functools.partial(_C.cpu_arithmetic, LOOP_ROUNDS, kind, threads) for kind in kinds]


def computed(case: Case) -> float:
    """Elements that are computed: of a self term half."""
    selves = {"self": case.m**2, "regularizer": case.m**2, "divergence": case.n**2 + case.m**2}.get(case.entry, 0)
    return case.elements - 0.5 * case.batch * case.d * selves


DIVERGENCES = (Case(16, 16, 2, "nothing to compute"), Case(1024, 1024, 32, "square, fits the caches"))


def run_bounds(cases: list[Case], rounds: int) -> list[dict[str, Any]]:
    """Gel/s with one thread and with all, and the share of the bound.

    Full covariances are left out: what a pair of them takes is not counted here.
    """
    import csdiv._C as _C

    before = torch.get_num_threads()
    records: list[dict[str, Any]] = []
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        for case in (c for c in cases if c.structure != "full"):
            inputs, provider, peaks = make_inputs(case), Csdiv("cpu", case.entry), loops(threads)
            calls: list[Callable[[], object]] = [
                *peaks,
                functools.partial(provider.forward, inputs),
                functools.partial(provider.forward_backward, leaves_of(inputs)),
            ]
            for call in calls:
                call()
            *peak_timings, forward, backward = interleave(calls, rounds)
            rates = [peak() / timing.median_ms / 1e6 for peak, timing in zip(peaks, peak_timings, strict=True)]
            for direction, timing in zip(DIRECTIONS, (forward, backward), strict=True):
                speed = computed(case) / timing.median_ms / 1e6
                products = takes_products(case)
                needed = operations_of_pair(case, direction != DIRECTIONS[0], _C.cpu_isa(), products=products)
                total = needed.multiplications + needed.additions + needed.integers
                amounts = (needed.multiplications, needed.additions, total)
                bound = case.d / max(amount / rate for amount, rate in zip(amounts, rates, strict=True))
                records.append(
                    {
                        "case": case.name,
                        "direction": direction,
                        "threads": threads,
                        "multiply_adds_per_ns": rates[0],
                        "additions_per_ns": rates[1],
                        "both_per_ns": rates[2],
                        "gel_per_s": speed,
                        "bound_gel_per_s": bound,
                        "share_of_bound": speed / bound,
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


SHARED_SIZES, SHARED_DIMS = (1024, 4096), (16, 32, 64, 128)
SHARED = {
    "(N, 1), (M, 1)": ("each", "each"),
    "(1, 1), (1, 1)": ("one", "one"),
    "points, (M, 1)": ("none", "each"),
    "(1, D), (1, D)": ("dims", "dims"),
    "points, (M, D)": ("none", "all"),
}
"""Shapes of variances, and how many there are on each side."""


def run_shared(rounds: int) -> list[dict[str, Any]]:
    """Rows of mixtures whose variances are shared, beside the same variances as (N, D) arrays, N = M."""
    records = []
    for n in SHARED_SIZES:
        for d in SHARED_DIMS:
            records += _run_shared(n, d, rounds)
    return records


def _run_shared(n: int, d: int, rounds: int) -> list[dict[str, Any]]:
    shapes = {"each": (n, 1), "one": (1, 1), "dims": (1, d), "all": (n, d), "none": (1, 1)}
    mu, _, nu, _, log_b = make_inputs(Case(n, n, d, ""))
    ways: list[Callable[[], object]] = []
    for sides in SHARED.values():
        s, t = (torch.zeros(shapes[k]) if k == "none" else torch.rand(shapes[k]) + 0.5 for k in sides)
        for spread in (False, True):
            both = [v.expand(n, d).contiguous() if spread else v for v in (s, t)]
            leaves = [mu.clone(), both[0], nu.clone(), both[1], log_b.clone()]
            wanted = [x.requires_grad_() for x in leaves if sides[0] != "none" or x is not both[0]]

            def call(backward: bool, leaves: list[Tensor] = leaves, wanted: list[Tensor] = wanted) -> object:
                with torch.set_grad_enabled(backward):
                    p, q = testing.mixture_of(*leaves[:2]), testing.mixture_of(*leaves[2:])
                    rows = csdiv.component_log_overlap(p, q, backend="cpu")
                    return torch.autograd.grad(rows.sum(), wanted) if backward else rows

            ways += [functools.partial(call, backward) for backward in (False, True)]
    for way in ways:
        way()
    times = iter([timing.median_ms for timing in interleave(ways, rounds)])
    records = []
    for name in SHARED:
        forward, backward, diagonal_forward, diagonal_backward = itertools.islice(times, 4)
        pairs = (forward, diagonal_forward), (backward, diagonal_backward)
        for direction, (shared, diagonal) in zip(DIRECTIONS, pairs, strict=True):
            where = {"variances": name, "size": n, "dim": d, "direction": direction}
            records.append({**where, "shared_ms": shared, "diagonal_ms": diagonal})
    return records


def run_divergences(rounds: int) -> list[dict[str, Any]]:
    """D_CS with all six gradients, milliseconds."""

    def divergence(*t: Tensor) -> Tensor:
        return csdiv.cs_divergence(testing.mixture_of(*t[:3]), testing.mixture_of(*t[3:]), backend="cpu")

    def plain(*t: Tensor) -> Tensor:
        return testing.eager("cs_divergence", testing.mixture_of(*t[:3]), testing.mixture_of(*t[3:]))

    torch.compiler.reset()
    ways: dict[str, Callable[..., Tensor]] = {
        "csdiv cpu": divergence,
        "eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        Floor.name: Nothing.apply,
    }
    records = []
    for case in DIVERGENCES:
        mu, s, *q = make_inputs(case)
        leaves = [t.requires_grad_() for t in (mu, s, torch.zeros(case.n), *q)]
        calls = [lambda f=f, x=leaves: torch.autograd.grad(f(*x), x) for f in ways.values()]
        for call in calls:
            call()
        for name, timing in zip(ways, interleave(calls, rounds), strict=True):
            records.append({"case": case.name, "provider": name, **timing.record()})
    return records


def shared_table(records: list[dict[str, Any]]) -> Iterator[str]:
    """How many times faster than the kernels for (N, D) arrays those for shared variances are."""
    yield f"\n| N = M | variances of p, of q | direction | {' | '.join(f'D = {d}' for d in SHARED_DIMS)} |"
    yield "|---|---|---|" + "---|" * len(SHARED_DIMS)
    for where in dict.fromkeys((r["size"], r["variances"], r["direction"]) for r in records):
        own = [r for r in records if (r["size"], r["variances"], r["direction"]) == where]
        ratios = [f"{r['diagonal_ms'] / r['shared_ms']:.1f}" for r in own]
        yield f"| {' | '.join(map(str, (*where, *ratios)))} |"


def tables(
    bounds: list[dict[str, Any]],
    instruction_sets: list[dict[str, Any]],
    divergences: list[dict[str, Any]],
    shared: list[dict[str, Any]],
) -> str:
    """The four results as Markdown."""
    return "\n".join(
        [
            "| case | direction | threads | Gel/s | bound Gel/s | share of the bound |",
            "|---|---|---|---|---|---|",
            *(
                f"| {r['case']} | {r['direction']} | {r['threads']} | {r['gel_per_s']:.2f} "
                f"| {r['bound_gel_per_s']:.1f} | {r['share_of_bound']:.0%} |"
                for r in bounds
            ),
            "\n| case | direction | instruction set | Gel/s |\n|---|---|---|---|",
            *(f"| {r['case']} | {r['direction']} | {r['isa']} | {r['gel_per_s']:.2f} |" for r in instruction_sets),
            "\n| D_CS, forward + backward | provider | median ms | quartiles ms |\n|---|---|---|---|",
            *(
                f"| {r['case']} | {r['provider']} | {r['median_ms']:.3f} | {r['lower_ms']:.3f} to {r['upper_ms']:.3f} |"
                for r in divergences
            ),
            "\nTimes of the diagonal kernels, which the same variances as (N, D) arrays take, divided by those of the "
            "kernels for shared variances:",
            *shared_table(shared),
        ]
    )
