"""One contract for every backend: values and gradients against float64, within the derived error budget.

The cases are curated lists, not a full product; ``test_cases_cover_the_contract`` says what they must contain.
"""

import pytest
import torch
from contract import (
    CASES,
    DIAGONAL,
    DTYPES,
    INPUTS,
    LAYOUTS,
    NATIVE,
    SCALARS,
    Case,
    P,
    Q,
    batches,
    call,
    check,
    full_pairs,
    gradients_later,
    row_structures,
    subsets,
)
from entries import BACKENDS

import csdiv
from csdiv import GaussianMixture, testing


def test_cpu_backend_is_available() -> None:
    """Without it the native half of this file would be missing silently."""
    assert "cpu" in BACKENDS, csdiv.backend_status()["cpu"].reason


def test_cases_cover_the_contract() -> None:
    seen = {(case.dtype, case.entry, name) for case in CASES for name in case.wanted}
    assert seen == {(dtype, entry, name) for dtype in DTYPES for entry in INPUTS for name in INPUTS[entry]}
    assert set(INPUTS) == set(testing.ENTRIES)
    for entry in INPUTS:
        cases = [case for case in CASES if case.entry == entry]
        assert {case.layout for case in cases} == set(LAYOUTS)
        pairs = {(s, t) for s in row_structures(entry) if s in DIAGONAL for t in DIAGONAL}
        assert {case.structures for case in cases} >= {*pairs, *full_pairs(entry)}
        assert {case.n for case in cases} | {case.m for case in cases} >= {1, 15, 16, 17, 31, 33, 511, 513}
        assert {case.batch for case in cases} >= set(batches(entry))
        assert {case.needs for case in cases} >= set(subsets(INPUTS[entry]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, backend: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("case", [case for case in CASES if case.entry in SCALARS and case.wanted], ids=str)
def test_contract_of_the_backward_pass(case: Case, backend: str) -> None:
    with gradients_later():
        check(case, backend)


ROWS = ("component_log_overlap", "log_prob", "cs_regularizer")
"""Entries on the CPU whose gradients come with the values, for an upstream gradient that is the same for all."""


@pytest.mark.parametrize("case", [case for case in CASES if case.entry in ROWS and case.wanted], ids=str)
def test_contract_of_one_upstream_gradient_for_all_rows(case: Case) -> None:
    check(case, "cpu", common_grad=-0.7)


@pytest.mark.parametrize("entry", [*SCALARS, "component_log_overlap"])
@pytest.mark.parametrize(
    ("backend", "n", "m"),
    [(backend, *size) for backend in NATIVE for size in [(3, 5), (140, 150), (300, 1030), (1030, 300), (1100, 40)]]
    + [("cpu", 40, 1100), ("cpu", 140, 1500), ("cpu", 2100, 2000)],
)
def test_values_are_the_same_bits_with_gradients_and_without(entry: str, n: int, m: int, backend: str) -> None:
    g = torch.Generator().manual_seed(n)
    for dtype in (torch.float32, torch.float64):
        p, q = (testing.random_mixture(size, 3, dtype=dtype, generator=g) for size in (n, m))
        plain = call(entry, backend)(p, q)
        p_wanted, q_wanted = (side.map(lambda t: t.clone().requires_grad_()) for side in (p, q))
        for sides in ((p_wanted, q), (p, q_wanted), (p_wanted, q_wanted)):
            assert torch.equal(plain, call(entry, backend)(*sides))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (33, 17, 3), (511, 513, 5), (16, 31, 64)])
@pytest.mark.parametrize("points", [True, False])
def test_assign_takes_the_largest(backend: str, dtype: torch.dtype, size: tuple[int, int, int], points: bool) -> None:
    g = torch.Generator().manual_seed(2)
    x = testing.random_mixture(size[0], size[2], structure="points" if points else "diagonal", dtype=dtype, generator=g)
    q = testing.random_mixture(size[1], size[2], dtype=dtype, generator=g)
    chosen = q.assign(x.means if points else x, backend=backend)
    assert chosen.dtype == torch.int64
    assert chosen.shape == size[:1]
    x, q = x.to(torch.float64), q.to(torch.float64)
    logits = testing.eager("pairwise_log_overlap", x, q) + q.log_weights
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    # Two logits that may swap differ by no more than both errors, of twice the pair's band at most.
    band = testing.band("pairwise_log_overlap", x, q, dtype=computed, scaled=False).amax(-1)
    gap = logits.amax(-1) - logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    assert bool((gap <= 2.0 * band).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_assign_takes_the_lowest_of_equal_ones(backend: str) -> None:
    q = GaussianMixture(torch.ones(70, 3), torch.ones(1, 1))
    assert q.assign(torch.zeros(9, 3), backend=backend).tolist() == [0] * 9
    heavier = torch.zeros(70)
    heavier[[40, 60]] = 1.0
    q = GaussianMixture(torch.ones(70, 3), torch.ones(1, 1), log_weights=heavier)
    assert q.assign(torch.zeros(9, 3), backend=backend).tolist() == [40] * 9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ["cs_divergence", "self_overlap", "component_log_overlap"])
def test_results_are_the_same_bits_for_any_number_of_threads(backend: str, entry: str) -> None:
    """The reference, whose sums torch partitions, promises the same bits for one number of threads."""
    g = torch.Generator().manual_seed(3)
    sizes, threads = ((5003, 5000), (1, 2, 1, 2)) if backend == "cpu" else ((403, 400), (2, 2))
    sides = [testing.random_mixture(size, 3, generator=g) for size in sizes]
    tensors = [t.requires_grad_() for side in sides for t in (side.means, side.variances, side.log_weights)]
    inputs = [t for name, t in zip(P + Q, tensors, strict=True) if name in INPUTS[entry]]
    runs = []
    for count in threads:
        torch.set_num_threads(count)
        value = call(entry, backend)(*sides)
        runs.append([value, *torch.autograd.grad(value.sum(), inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
