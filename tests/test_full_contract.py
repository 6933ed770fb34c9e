"""Full covariances on the backends that have them; test_contract.py has them against every other structure."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from full_pairs import FULL, NATIVE, call
from torch import Tensor

import csdiv._C as _C
from csdiv import GaussianMixture, backends, testing

ENTRIES = ("cs_divergence", "log_overlap", "self_overlap", "component_log_overlap", "pairwise_log_overlap")
CHECKED = dict.fromkeys(NATIVE, ENTRIES) | {"reference": ("component_log_overlap", "pairwise_log_overlap")}
"""The entries of each backend; the reference makes the others of these."""
NAMES = ("p_means", "p_spreads", "p_log_weights", "q_means", "q_spreads", "q_log_weights")
UNUSED = {
    "self_overlap": NAMES[3:],
    "component_log_overlap": ("p_log_weights",),
    "pairwise_log_overlap": ("p_log_weights", "q_log_weights"),
}
LANES = 8  # of the widest instruction set, in float64
SIZES = [(1, 1), (2, LANES - 1), (3, LANES), (5, LANES + 1)]
SEVERAL_TILES = [(31, 67), (2, 131), (131, 2)]  # and chunks of columns
DIMS = (1, 2, 3, 4, 5, 6, 8, 9, 16, 31, 32)
BATCHES = [((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((0,), ()), ((1,), (2,))]


class Case(NamedTuple):
    entry: str
    structures: tuple[str, str] = ("full", "full")
    dtype: torch.dtype = torch.float32
    n: int = 5
    m: int = 11
    dim: int = 3
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    needs: tuple[str, ...] = NAMES
    absent: bool = False  # whether every other component has weight zero

    def __str__(self) -> str:
        changed = [value for value, default in zip(self, Case(""), strict=True) if value != default]
        return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in changed)

    @property
    def wanted(self) -> list[str]:
        return [name for name in self.needs if name not in UNUSED.get(self.entry, ())]


CASES = [
    *(Case(entry, dtype=dtype) for entry in ENTRIES for dtype in (torch.float32, torch.float64)),
    *(Case(entry, dtype=torch.float64, n=n, m=m) for entry in ENTRIES for n, m in SIZES),
    *(Case("component_log_overlap", dtype=torch.float64, n=n, m=m, dim=2) for n, m in SEVERAL_TILES),
    Case("self_overlap", dtype=torch.float64, n=67, dim=2),
    *(
        Case("component_log_overlap", dtype=dtype, dim=d, n=3, m=9)
        for d in DIMS
        for dtype in (torch.float32, torch.float64)
    ),
    *(Case("cs_divergence", ("full", "diagonal"), dim=d, n=3, m=9) for d in DIMS),
    *(Case(entry, ("tied full", "full"), n=3, m=4, batch=batch) for entry in ENTRIES for batch in BATCHES),
    *(
        Case("component_log_overlap", pair, torch.float64, n=3, m=4, batch=batch)
        for pair in (("points", "full"), ("tied full", "tied full"))
        for batch in BATCHES
    ),
    *(Case("component_log_overlap", ("points", "full"), torch.float64, dim=d, n=6, m=9) for d in DIMS),
    *(Case("component_log_overlap", ("tied diagonal", "full"), torch.float64, n, m, 2) for n, m in SEVERAL_TILES),
    *(Case(entry, ("points", t)) for entry in ("component_log_overlap", "pairwise_log_overlap") for t in FULL),
    *(Case("log_overlap", (s, "points"), torch.float64) for s in FULL),
    *(Case("component_log_overlap", ("points", "full"), needs=(n,)) for n in NAMES if n != "p_log_weights"),
    *(
        Case("pairwise_log_overlap", ("tied full", "full"), torch.float64, needs=(n,))
        for n in ("p_spreads", "q_spreads")
    ),
    *(Case("component_log_overlap", needs=(name,)) for name in NAMES if name != "p_log_weights"),
    *(Case("log_overlap", needs=tuple(n for n in NAMES if n != name)) for name in NAMES),
    *(Case("pairwise_log_overlap", needs=(name,)) for name in ("p_means", "q_spreads")),
    *(Case(entry, absent=True, dtype=torch.float64) for entry in ENTRIES),
]


def random_tensors(case: Case) -> list[Tensor]:
    """Means, variances or factors, and log weights of both sides, float64 but of the dtype's values."""
    g = torch.Generator().manual_seed(sum(map(ord, str(case))))
    tensors = []
    for size, structure, batch in zip((case.n, case.m), case.structures, case.batch, strict=True):
        made = testing.random_mixture(
            size, case.dim, batch_shape=batch, structure=structure, dtype=case.dtype, generator=g
        )
        spreads = made.variances if made.scale_tril is None else made.scale_tril
        log_weights = made.log_weights.clone()
        if case.absent:
            log_weights[..., 1::2] = -math.inf
        tensors += [made.means, spreads, log_weights]
    return tensors


def make_sides(case: Case, tensors: list[Tensor]) -> list[GaussianMixture]:
    return [
        GaussianMixture(means, scale_tril=spreads.tril(), log_weights=log_weights)
        if structure in FULL
        else GaussianMixture(means, spreads, log_weights=log_weights)
        for structure, (means, spreads, log_weights) in zip(case.structures, (tensors[:3], tensors[3:]), strict=True)
    ]


def evaluate(case: Case, dtype: torch.dtype, function: Callable[..., Tensor]) -> Any:
    """The sides, the value, its upstream gradient, and the wanted tensors with their gradients."""
    named = dict(zip(NAMES, random_tensors(case), strict=True))
    leaves = {name: t.to(dtype, copy=True).requires_grad_(name in case.wanted) for name, t in named.items()}
    sides = make_sides(case, list(leaves.values()))
    value = function(*sides)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(case.dtype)
    wanted = [leaves[name] for name in case.wanted]
    return sides, value, grad, wanted, torch.autograd.grad(value, wanted, grad.to(dtype))


def is_checked(case: Case, backend: str) -> bool:
    """Whether a backend is held to the case: the emulation to as many as tell it anything new, as it is slow."""
    if backend == emulation.NAME:
        repeated = case.dtype == torch.float32 and case.dim > 9
        if repeated or not set(case.structures) <= {*FULL, "diagonal"}:
            return False
    return case.entry in CHECKED[backend]


@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, backend) for backend in CHECKED for case in CASES if is_checked(case, backend)],
    ids=str,
)
def test_full_contract(case: Case, backend: str) -> None:
    """Values and gradients are within the budget of csdiv.testing."""
    plain = functools.partial(testing.eager, case.entry)  # the yardstick shares no path with what is tested
    sides, exact, grad, leaves, exact_grads = evaluate(case, torch.float64, plain)
    _, eager, _, _, eager_grads = evaluate(case, case.dtype, plain)
    _, actual, _, _, grads = evaluate(case, case.dtype, call(case.entry, backend))
    assert actual.dtype == case.dtype
    options = {"dtype": case.dtype, "scaled": backend != "reference" and case.dtype == torch.float32}
    testing.assert_within_budget(actual, eager, exact, testing.band(case.entry, *sides, **options))
    bands = testing.gradient_bands(case.entry, *sides, grad, leaves, **options)
    for name, a, e, x, band in zip(case.wanted, grads, eager_grads, exact_grads, bands, strict=True):
        assert a.dtype == case.dtype
        try:
            testing.assert_within_budget(a, e.nan_to_num(), x.nan_to_num(), band)
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from None


def test_full_cases_cover_the_contract() -> None:
    for entry in ENTRIES:
        cases = [case for case in CASES if case.entry == entry]
        assert {name for case in cases for name in case.wanted} == set(NAMES) - set(UNUSED.get(entry, ()))


def test_full_limit_is_that_of_the_kernels() -> None:
    assert _C.cpu_max_full_dim == backends.MAX_FULL_DIM
    assert emulation.backend().native.cuda_max_full_dim == backends.MAX_FULL_DIM
