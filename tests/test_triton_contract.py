"""The Triton backend without a GPU, interpreted: its kernels are held to the contract.

The interpreter takes milliseconds for each tile, so these are the small ones of the cases that other backends are held
to.
"""

from __future__ import annotations

import pytest
import torch
from contract import (
    BATCHES,
    CASES,
    DIAGONAL,
    DTYPES,
    INPUTS,
    SCALES,
    Case,
    check,
    gradients_later,
    subsets,
)
from triton_marks import NAME, interpreted

import csdiv
from csdiv import backends, testing, weightings

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


@interpreted
def test_the_interpreter_takes_part() -> None:
    """Without it most of this file would be missing silently."""
    assert backends.backend_status()[NAME].available


# Of the cases of the contract: everything that the kernels see, less of what csdiv.backends.arrays does for all.
FEW = ("cs_divergence", "component_log_overlap", "pairwise_log_overlap")
TILES = [(1, 1, 1), (17, 33, 15)]


def is_chosen(case: Case) -> bool:
    plain = Case(case.entry)
    if case == plain or (case == plain._replace(dtype=torch.float64)) or case.scale in SCALES:
        return True
    if (case.n, case.m, case.dim) in TILES:
        return True
    if case.entry not in FEW:
        return False
    subset = case == plain._replace(needs=case.needs)
    return subset or case.batch in BATCHES[:6:2] + BATCHES[7:8] or case == plain._replace(structures=("points",) * 2)


CHOSEN = [case for case in CASES if is_chosen(case)]


@interpreted
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_contract(case: Case) -> None:
    check(case, NAME)


def test_the_chosen_cases_cover_the_kernels() -> None:
    assert {case.entry for case in CHOSEN} == set(INPUTS)
    for entry in FEW:
        cases = [case for case in CHOSEN if case.entry == entry]
        assert {case.needs for case in cases} >= set(subsets(INPUTS[entry]))
        assert {case.dtype for case in cases} == set(DTYPES[:2])
        assert {case.scale for case in cases} == {"plain", *SCALES}


@interpreted
def test_channels_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightings, "COSTS", (1, 0, 0, 2**80))
    monkeypatch.setattr(weightings, "SMALL", (0, 0))
    p, q = (testing.random_mixture(k, 3, dtype=torch.float64).map(lambda t: t.requires_grad_()) for k in (5, 6))
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    values = [csdiv.channel_log_overlap(p, q, a, b, backend=backend) for backend in (NAME, "reference")]
    torch.testing.assert_close(*values)
    leaves = [p.means, p.variances, q.means, q.variances]
    torch.testing.assert_close(*(torch.autograd.grad(value.sin().sum(), leaves) for value in values))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "self_overlap"])
def test_contract_of_the_backward_pass(entry: str, dtype: torch.dtype) -> None:
    with gradients_later():
        check(Case(entry, dtype), NAME)


# Tiles have 128 columns and 16 rows (4 of float64); flags are for 32 dimensions, a group has 4.
AROUND_TILES = [
    *(Case("cs_divergence", n=n, m=m, dim=2) for n, m in ((15, 127), (129, 16), (128, 1))),
    *(Case("component_log_overlap", torch.float64, n, m, 3) for n, m in ((3, 129), (5, 128))),
    *(Case("log_overlap", n=3, m=5, dim=dim) for dim in (4, 31, 33, 65)),
    *(Case("pairwise_log_overlap", n=n, m=m, dim=1) for n, m in ((17, 129), (129, 2))),
]


@interpreted
@pytest.mark.parametrize("case", AROUND_TILES, ids=str)
def test_contract_around_the_sizes_of_tiles(case: Case) -> None:
    check(case, NAME)


# One variance for each component: the direct form, and from 16 dimensions on in float32 that by matrix products.
SPHERICAL = Case("component_log_overlap", n=3, m=4, dim=17, structures=("spherical", "spherical"))


OF_SPHERICAL = [
    *(Case("cs_divergence", n=3, m=4, dim=2, structures=(s, t)) for s in DIAGONAL for t in DIAGONAL),
    *(SPHERICAL._replace(entry=entry) for entry in INPUTS if entry not in ("cs_regularizer", "responsibilities")),
    *(SPHERICAL._replace(dtype=dtype) for dtype in DTYPES[1:]),
    *(SPHERICAL._replace(needs=needs) for needs in subsets(INPUTS["component_log_overlap"])),
    *(SPHERICAL._replace(entry="log_overlap", scale=scale) for scale in SCALES),
    *(SPHERICAL._replace(entry="log_overlap", batch=BATCHES[k]) for k in (0, 2)),
    *(SPHERICAL._replace(n=n, m=m, dim=dim) for n, m, dim in ((1, 1, 16), (33, 2, 33), (2, 129, 65))),
    SPHERICAL._replace(structures=("points", "tied spherical")),
    SPHERICAL._replace(entry="cs_divergence", structures=("tied spherical", "tied spherical"), dim=64),
]


@interpreted
@pytest.mark.parametrize("case", OF_SPHERICAL, ids=str)
def test_contract_of_spherical_components(case: Case) -> None:
    check(case, NAME)


# In each dimension one variance for all components of a side: the same two forms, of other squares.
TIED = Case("component_log_overlap", n=3, m=4, dim=17, structures=("tied diagonal", "tied diagonal"))


OF_TIED = [
    *(TIED._replace(entry=entry) for entry in INPUTS if entry not in ("cs_regularizer", "responsibilities")),
    *(TIED._replace(dtype=dtype, dim=dim) for dtype in DTYPES[:2] for dim in (4, 33)),
    *(TIED._replace(dtype=dtype) for dtype in DTYPES[2:]),
    *(TIED._replace(needs=needs) for needs in subsets(INPUTS["component_log_overlap"])),
    *(TIED._replace(entry="log_overlap", scale=scale, dim=dim) for scale in SCALES for dim in (3, 16)),
    *(TIED._replace(entry="log_overlap", dtype=torch.float64, scale=scale, dim=3) for scale in SCALES[2:3]),
    *(TIED._replace(entry="log_overlap", batch=BATCHES[k], dim=dim) for k, dim in ((0, 17), (2, 3))),
    TIED._replace(entry="cs_divergence", batch=BATCHES[1], dim=16),
    *(TIED._replace(n=n, m=m, dim=dim) for n, m, dim in ((1, 1, 16), (33, 2, 32), (2, 129, 5), (2, 3, 65))),
    *(TIED._replace(structures=("points", "tied diagonal"), dim=dim) for dim in (3, 17)),
    TIED._replace(entry="cs_divergence", structures=("tied spherical", "tied diagonal")),
    TIED._replace(entry="cs_divergence", structures=("tied diagonal", "tied spherical"), dim=3),
]


@interpreted
@pytest.mark.parametrize("case", OF_TIED, ids=str)
def test_contract_of_tied_variances(case: Case) -> None:
    check(case, NAME)


# The rows alone tied, as points are: a form for values and the gradients of the other side.
TIED_ROWS = TIED._replace(dim=5, structures=("tied diagonal", "diagonal"))


OF_TIED_ROWS = [
    *(TIED_ROWS._replace(entry=entry) for entry in INPUTS if entry not in ("cs_regularizer", "responsibilities")),
    *(TIED_ROWS._replace(entry=entry, structures=("diagonal", "tied diagonal")) for entry in FEW),
    *(TIED_ROWS._replace(needs=needs) for needs in subsets(INPUTS["component_log_overlap"])),
    *(TIED_ROWS._replace(entry="log_overlap", scale=scale) for scale in SCALES),
    *(TIED_ROWS._replace(dtype=torch.float64, scale=scale) for scale in ("plain", *SCALES[2:3])),
    *(TIED_ROWS._replace(dtype=dtype) for dtype in DTYPES[2:]),
    *(TIED_ROWS._replace(entry="log_prob", n=n, m=m, dim=dim) for n, m, dim in ((17, 129, 4), (5, 3, 33))),
    *(TIED_ROWS._replace(entry=entry, batch=BATCHES[k]) for entry, k in zip(FEW[:2], (2, 1), strict=True)),
]


@interpreted
@pytest.mark.parametrize("case", OF_TIED_ROWS, ids=str)
def test_contract_of_tied_rows(case: Case) -> None:
    check(case, NAME)
