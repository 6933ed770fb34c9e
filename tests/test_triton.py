"""The Triton backend without a GPU: interpreted, its kernels are held to the contract; compiled, they do not spill.

The interpreter takes milliseconds for each tile, so these are the small ones of the cases that other backends are held
to. Machine code is made in processes of their own, where kernels are not interpreted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import interpreter
import pytest
import test_bad_inputs
import test_kernels_edges
import torch
from test_contract import (
    BATCHES,
    CASES,
    DIAGONAL,
    DTYPES,
    INPUTS,
    SCALES,
    Case,
    P,
    Q,
    call,
    check,
    gradients_later,
    subsets,
)
from test_near_zero import near_copies
from torch import Tensor

import csdiv
from bench import tune
from csdiv import GaussianMixture, backends, reductions, testing
from csdiv.kernels import configurations

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
NAME = interpreter.NAME
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton")
interpreted = pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="no triton, or a GPU for it")
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
    monkeypatch.setattr(reductions, "COSTS", (1, 0, 0))
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
@interpreted
@pytest.mark.parametrize(
    "case",
    [
        *(Case("cs_divergence", n=n, m=m, dim=2) for n, m in ((15, 127), (129, 16), (128, 1))),
        *(Case("component_log_overlap", torch.float64, n, m, 3) for n, m in ((3, 129), (5, 128))),
        *(Case("log_overlap", n=3, m=5, dim=dim) for dim in (4, 31, 33, 65)),
        *(Case("pairwise_log_overlap", n=n, m=m, dim=1) for n, m in ((17, 129), (129, 2))),
    ],
    ids=str,
)
def test_contract_around_the_sizes_of_tiles(case: Case) -> None:
    check(case, NAME)


# One variance for each component: the direct form, and from 16 dimensions on in float32 that by matrix products.
SPHERICAL = Case("component_log_overlap", n=3, m=4, dim=17, structures=("spherical", "spherical"))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        *(Case("cs_divergence", n=3, m=4, dim=2, structures=(s, t)) for s in DIAGONAL for t in DIAGONAL),
        *(SPHERICAL._replace(entry=entry) for entry in INPUTS if entry not in ("cs_regularizer", "responsibilities")),
        *(SPHERICAL._replace(dtype=dtype) for dtype in DTYPES[1:]),
        *(SPHERICAL._replace(needs=needs) for needs in subsets(INPUTS["component_log_overlap"])),
        *(SPHERICAL._replace(entry="log_overlap", scale=scale) for scale in SCALES),
        *(SPHERICAL._replace(entry="log_overlap", batch=BATCHES[k]) for k in (0, 2)),
        *(SPHERICAL._replace(n=n, m=m, dim=dim) for n, m, dim in ((1, 1, 16), (33, 2, 33), (2, 129, 65))),
        SPHERICAL._replace(structures=("points", "tied spherical")),
        SPHERICAL._replace(entry="cs_divergence", structures=("tied spherical", "tied spherical"), dim=64),
    ],
    ids=str,
)
def test_contract_of_spherical_components(case: Case) -> None:
    check(case, NAME)


# In each dimension one variance for all components of a side: the same two forms, of other squares.
TIED = Case("component_log_overlap", n=3, m=4, dim=17, structures=("tied diagonal", "tied diagonal"))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
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
    ],
    ids=str,
)
def test_contract_of_tied_variances(case: Case) -> None:
    check(case, NAME)


# The rows alone tied, as points are: a form for values and the gradients of the other side.
TIED_ROWS = TIED._replace(dim=5, structures=("tied diagonal", "diagonal"))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        *(TIED_ROWS._replace(entry=entry) for entry in INPUTS if entry not in ("cs_regularizer", "responsibilities")),
        *(TIED_ROWS._replace(entry=entry, structures=("diagonal", "tied diagonal")) for entry in FEW),
        *(TIED_ROWS._replace(needs=needs) for needs in subsets(INPUTS["component_log_overlap"])),
        *(TIED_ROWS._replace(entry="log_overlap", scale=scale) for scale in SCALES),
        *(TIED_ROWS._replace(dtype=torch.float64, scale=scale) for scale in ("plain", *SCALES[2:3])),
        *(TIED_ROWS._replace(dtype=dtype) for dtype in DTYPES[2:]),
        *(TIED_ROWS._replace(entry="log_prob", n=n, m=m, dim=dim) for n, m, dim in ((17, 129, 4), (5, 3, 33))),
        *(TIED_ROWS._replace(entry=entry, batch=BATCHES[k]) for entry, k in zip(FEW[:2], (2, 1), strict=True)),
    ],
    ids=str,
)
def test_contract_of_tied_rows(case: Case) -> None:
    check(case, NAME)


@pytest.fixture
def direct_sums() -> Iterator[list[int]]:
    """Grows where the direct form is taken."""
    squares, taken = importlib.import_module("csdiv.kernels.squares"), list[int]()
    plain = squares.direct_squares
    with mock.patch.object(squares, "direct_squares", lambda *a: taken.append(1) or plain(*a)):
        yield taken


@interpreted
@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("spread", [1.0, 3.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("structure", ["spherical", "tied diagonal"])
def test_the_matrix_form_does_not_cancel(structure: str, spread: float, shift: float, direct_sums: list[int]) -> None:
    """It is taken where pairs are as far apart as from the tile's mean."""
    g = torch.Generator().manual_seed(int(spread + shift))
    p, q = (testing.random_mixture(k, 32, structure=structure, spread=spread, generator=g) for k in (4, 5))
    p, q = (GaussianMixture(side.means + shift, side.variances, side.log_weights) for side in (p, q))
    test_kernels_edges.check("component_log_overlap", NAME, p, q)
    assert not direct_sums


@interpreted
@pytest.mark.parametrize(("spread", "direct"), [(0.2, False), (1.0, True), (10.0, True), (100.0, True)])
@pytest.mark.parametrize("structure", ["spherical", "tied diagonal"])
def test_near_pairs_take_the_direct_form(structure: str, spread: float, direct: bool, direct_sums: list[int]) -> None:
    """Unless all of the tile is near, against the variances."""
    q = testing.random_mixture(5, 32, structure=structure, spread=spread)
    p = GaussianMixture(q.means[:4] + 0.1, q.variances[:4], q.log_weights[:4])
    test_kernels_edges.check("component_log_overlap", NAME, p, q)
    assert bool(direct_sums) == direct


SHAPES = {"diagonal": (3, 2), "spherical": (3, 1), "tied": (1, 2), "points": (1, 1)}


@interpreted
@pytest.mark.parametrize(
    ("p", "q", "batches", "forms"),
    [
        ("diagonal", "diagonal", ((), ()), ("diagonal", "diagonal", "diagonal")),
        ("diagonal", "tied", ((), ()), ("diagonal", "tied rows", "diagonal")),
        ("spherical", "tied", ((), ()), ("diagonal", "tied rows", "diagonal")),
        ("spherical", "points", ((), ()), ("spherical", "spherical", "spherical")),
        ("points", "diagonal", ((), ()), ("tied rows", "diagonal", "tied")),
        ("tied", "tied", ((), ()), ("tied", "tied", "tied")),
        ("points", "tied", ((), ()), ("tied", "tied", "tied")),
        ("tied", "tied", ((4,), (4,)), ("tied", "tied", "tied")),
        ("tied", "tied", ((), (4,)), ("tied", "tied", "tied")),
        ("tied", "tied", ((4,), ()), ("diagonal", "tied rows", "diagonal")),  # one problem, whose rows differ
        ("points", "tied", ((4,), ()), ("tied", "tied", "tied")),
        ("tied", "tied", ((1,), ()), ("tied", "tied", "tied")),
    ],
)
def test_the_form_is_that_of_what_variances_share(
    p: str, q: str, batches: tuple[tuple[int, ...], tuple[int, ...]], forms: tuple[str, str, str]
) -> None:
    """Of p against q, of the sweep for p, whose rows are q, and of p with itself."""
    arrays, module = importlib.import_module("csdiv.backends.arrays"), sys.modules[f"csdiv.backends.{NAME}"]
    sides = []
    for name, batch in zip((p, q), batches, strict=True):
        variances = torch.ones(*(batch if name != "points" else ()), *SHAPES[name])
        sides.append(arrays.make_side(torch.zeros(*batch, 3, 2), variances))
    problem = module._problem(arrays.flattened(arrays.Pair(*sides)))
    own = problem.with_itself(problem.p)
    assert (problem.form(), problem.form(rows_of_q=True), own.form()) == forms
    assert own.form(rows_of_q=True) == own.form()


@pytest.mark.parametrize("structure", configurations.STRUCTURES)
def test_products_are_taken_in_float32_from_some_dimension_on(structure: str) -> None:
    def form(dtype: torch.dtype, dim: int, exact: bool = False) -> str:
        return configurations.form_of(structure, dtype, dim, exact=exact)

    first = configurations.MATRIX_DIM
    products = structure if structure in ("diagonal", "tied rows") else f"{structure} matrix"
    assert [form(torch.float32, dim) for dim in (1, first - 1, first, 1000)] == [structure] * 2 + [products] * 2
    assert form(torch.float64, first) == form(torch.float32, first, exact=True) == structure


@interpreted
@pytest.mark.parametrize("dim", [3, 17])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_components_against_tied_variances_give_equal_bits(tied: bool, dim: int) -> None:
    means, variances, equal = torch.randn(5, dim) * 100, torch.rand(5, dim) + 0.5, [0, 1, 2, 1, 0, 3, 4, 1]
    q = GaussianMixture(means[equal], variances[:1] if tied else variances[equal])
    x = GaussianMixture(means[[1, 3, 0]] + 0.01, torch.rand(1, dim) + 0.5)
    assert q.assign(x, backend=NAME).tolist() == [1, 5, 0]
    densities = csdiv.pairwise_log_overlap(x, q, backend=NAME)
    assert torch.equal(densities[:, [0, 1, 1]], densities[:, [4, 3, 7]])


# What is no component, or has no weight, is put among the others of a tile with their variance.
@interpreted
@pytest.mark.parametrize("dim", [3, 17])
@pytest.mark.parametrize("exponent", [0, 30])
def test_components_without_weight_do_not_spoil_a_tied_tile(dim: int, exponent: int, direct_sums: list[int]) -> None:
    p, q = (
        GaussianMixture((side.means + 50) * 2.0 ** (exponent // 2), side.variances * 2.0**exponent, side.log_weights)
        for side in (testing.random_mixture(k, dim, structure="tied diagonal", spread=3.0) for k in (4, 5))
    )
    silent = torch.tensor([0, 2])
    means, log_weights = (t.index_fill(0, silent, x) for t, x in ((q.means, torch.nan), (q.log_weights, -torch.inf)))
    q = GaussianMixture(means, q.variances, log_weights)
    fewer = GaussianMixture(means[[1, 3, 4]], q.variances, log_weights[[1, 3, 4]])
    tied = importlib.import_module("csdiv.kernels.tied")
    with mock.patch.object(tied, "tile_log2_densities", side_effect=AssertionError("an irregular tile")):
        for sides in ((p, q), (q, p)):
            value = csdiv.log_overlap(*sides, backend=NAME)
            expected = csdiv.log_overlap(*(fewer if side is q else side for side in sides), backend="reference")
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert bool(direct_sums) == (dim < configurations.MATRIX_DIM)


@interpreted
@pytest.mark.parametrize(("bad", "dim"), [(-1.0, 3), (torch.nan, 3), (torch.inf, 3), (0.0, 3), (-1.0, 17)])
def test_bad_tied_variances_give_what_the_diagonal_form_gives(bad: float, dim: int) -> None:
    p, q = (testing.random_mixture(k, dim, structure="tied diagonal") for k in (3, 4))
    variances = q.variances.clone()
    variances[0, 1] = bad
    for own_variances in (p.variances, torch.zeros(1, 1)):
        found = []
        for own, other in ((3, 4), (1, 1), (3, 1), (1, 4)):
            leaves = [t.clone().requires_grad_() for t in (p.means, q.means)]
            side = GaussianMixture(leaves[0], own_variances.expand(own, dim), p.log_weights)
            spoilt = GaussianMixture(leaves[1], variances.expand(other, dim), q.log_weights)
            total = csdiv.log_overlap(spoilt, side, backend=NAME)
            found.append([total, *torch.autograd.grad(total, leaves)])
        for values in found[1:]:
            torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bad >= 0 or bool(found[0][0].isnan())
        silent = GaussianMixture(q.means, variances, torch.full((4,), -torch.inf))
        assert csdiv.log_overlap(side, silent, backend=NAME) == -torch.inf


@interpreted
@pytest.mark.parametrize(("entry", "wanted"), [("cs_divergence", ()), ("log_overlap", P + Q)])
def test_columns_in_parts(entry: str, wanted: tuple[str, ...]) -> None:
    """Two parts or more of the rows' sums, and of the sweeps; the same bits with gradients and without."""
    p, q = (testing.random_mixture(k, 1, generator=torch.Generator().manual_seed(k)) for k in (3, 390))
    assert configurations.cut(interpreter.PROCESSORS * 16, 1, 390 // 128 + 1) == 2
    test_kernels_edges.check(entry, NAME, p, q, wanted)
    if wanted:
        with_gradients = [side.map(lambda t: t.clone().requires_grad_()) for side in (p, q)]
        assert torch.equal(call(entry, NAME)(p, q), call(entry, NAME)(*with_gradients))
        assert torch.equal(q.assign(p, backend=NAME), q.assign(p, backend="reference"))


@interpreted
def test_parts_do_not_change_the_assignment_of_equal_ones() -> None:
    q = GaussianMixture(torch.ones(520, 1), torch.ones(1, 1))
    assert q.assign(torch.zeros(2, 1), backend=NAME).tolist() == [0, 0]
    heavier = torch.zeros(520)
    heavier[[200, 400]] = 1.0
    q = GaussianMixture(torch.ones(520, 1), torch.ones(1, 1), heavier)
    assert q.assign(torch.zeros(2, 1), backend=NAME).tolist() == [200, 200]


@interpreted
@pytest.mark.parametrize("exponents", [(-22, -22), (-21, 19), (19, 19), (20, -20), (21, 20)])
def test_variances_around_the_limits_of_the_fast_form(exponents: tuple[int, int]) -> None:
    test_kernels_edges.test_variances_around_the_limits_of_the_fast_form("component_log_overlap", exponents, NAME)


@interpreted
@pytest.mark.parametrize("distance", [2.0**28, 2.0**31, -(2.0**40)])
def test_means_around_the_limits_of_the_fast_form(distance: float) -> None:
    test_kernels_edges.test_means_around_the_limits_of_the_fast_form(1.0, distance, NAME)


@interpreted
@pytest.mark.parametrize("exponent", [-600, 600])
def test_float64_far_from_one(exponent: int) -> None:
    test_kernels_edges.test_float64_far_from_one(exponent, NAME)


@interpreted
def test_some_dimensions_fast_and_others_exact() -> None:
    """A tile has flags for 32 dimensions each: these of one variance, those of variances a factor of 1e30 apart."""
    p, q = test_kernels_edges.pair(5, 6, 40)
    wild = torch.ones(40)
    wild[35] = 1e15
    q = GaussianMixture(q.means, torch.cat([q.variances[:3] * wild, q.variances[3:] / wild]), q.log_weights)
    test_kernels_edges.check("log_overlap", NAME, p, q)


@interpreted
def test_shares_down_to_the_smallest_numbers() -> None:
    test_kernels_edges.test_shares_down_to_the_smallest_numbers("component_log_overlap", 95.0, NAME)


@pytest.fixture
def canaries() -> Iterator[list[Tensor]]:
    """Puts memory that nobody may write before and behind whatever is allocated for kernels; all of it so far."""
    guards = list[Tensor]()

    def padded(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(t: Tensor, *shape: Any, **options: Any) -> Tensor:
            size = torch.Size(*shape) if isinstance(shape[0], Sequence) else torch.Size(shape)
            whole = plain(t, (size.numel() + 128,), **options)
            guards.extend(guard.fill_(77) for guard in (whole[:64], whole[-64:]))
            return whole[64:-64].view(size)

        return allocate

    with contextlib.ExitStack() as patches:
        for name in ("new_empty", "new_zeros"):
            patches.enter_context(mock.patch.object(Tensor, name, padded(getattr(Tensor, name))))
        yield guards


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (5, 129, 2)])
def test_nothing_is_written_beyond_the_outputs(
    n: int, m: int, dim: int, dtype: torch.dtype, canaries: list[Tensor]
) -> None:
    p, q = (testing.random_mixture(k, dim, dtype=dtype).map(lambda t: t.clone().requires_grad_()) for k in (n, m))
    leaves = [t for side in (p, q) for t in (side.means, side.variances, side.log_weights)]
    for entry in ("cs_divergence", "component_log_overlap", "pairwise_log_overlap"):
        value = call(entry, NAME)(p, q)
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    q.assign(p, backend=NAME)
    assert len(canaries) > 50
    assert all(bool((guard == 77).all()) for guard in canaries)


@interpreted
@pytest.mark.parametrize(("item", "n", "tile", "dim"), [(0, 5, 0, 3), (3, 2**20, 8191, 1025), (2**20, 300, 2, 40)])
def test_offsets_beyond_32_bits(item: int, n: int, tile: int, dim: int) -> None:
    probe = importlib.import_module("triton_probes").tile_offsets
    kernel = importlib.import_module("triton.runtime.interpreter").InterpretedFunction(probe)
    values, flags = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    value_offsets, flag_offset = torch.zeros(128, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](values, flags, value_offsets, flag_offset, item, n, tile, dim)
    tiles = item * -(-n // 128) + tile
    first = 4 * tiles * 256 * (-(-dim // 4) * 4)
    assert value_offsets.tolist() == [first + 4 * k for k in range(128)]
    assert flag_offset.item() == 4 * tiles * -(-dim // 32)


BAD_INPUTS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_bad_inputs.test_no_points, {}),
    (test_bad_inputs.test_half_precision_is_computed_in_float32, {"dtype": torch.bfloat16}),
    (test_bad_inputs.test_infinite_or_undefined_weight, {"value": float("inf")}),
    *(
        (test, {"dtype": torch.float32})
        for test in (
            test_bad_inputs.test_a_side_without_any_weight,
            test_bad_inputs.test_negative_variance_gives_nan,
            test_bad_inputs.test_zero_variance_is_a_point,
            test_bad_inputs.test_infinite_variance_overlaps_with_nothing,
            test_bad_inputs.test_means_far_apart,
            test_bad_inputs.test_duplicated_components_are_one_with_the_merged_weight,
        )
    ),
]


@interpreted
@pytest.mark.parametrize(("test", "arguments"), BAD_INPUTS, ids=lambda a: getattr(a, "__name__", ""))
def test_bad_inputs(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    test(backend=NAME, **arguments)


@interpreted
@pytest.mark.parametrize("distance", [0.0, 1e-3])
def test_cs_divergence_near_zero(distance: float) -> None:
    p, q = near_copies(64, 20, distance)
    exact = csdiv.cs_divergence(p.to(torch.float64), q.to(torch.float64), backend="reference")
    assert (csdiv.cs_divergence(p, q, backend=NAME).double() - exact).abs() <= 6e-6


@interpreted
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize(("dim", "size"), [(8, 20), (64, 12)])
def test_cs_divergence_of_tied_variances_near_zero(dim: int, size: int, distance: float) -> None:
    """Both sides tied, and one of them: the three terms in up to three forms."""
    p, q = near_copies(dim, size, distance, "tied diagonal")
    untied = GaussianMixture(q.means, q.variances * (1 + distance * torch.randn(size, dim)), q.log_weights)
    for other in (q, untied):
        exact = csdiv.cs_divergence(p.to(torch.float64), other.to(torch.float64), backend="reference")
        assert (csdiv.cs_divergence(p, other, backend=NAME).double() - exact).abs() <= 6e-6


@interpreted
def test_a_cold_capture_is_refused_until_warmup() -> None:
    module, p = sys.modules[f"csdiv.backends.{NAME}"], testing.random_mixture(3, 2)
    with mock.patch.object(module, "capturing", return_value=True), mock.patch.object(module, "loaded", set()):
        with pytest.raises(RuntimeError, match=r"CUDA graph capture on cpu: call csdiv.warmup\('cpu'\) before it"):
            csdiv.log_overlap(p, backend=NAME)
        module.loaded.add(torch.device("cpu"))
        csdiv.log_overlap(p, backend=NAME)


@interpreted
@pytest.mark.parametrize("key", tune.LAUNCHES, ids=str)
def test_every_tile_that_is_timed_gives_the_same(key: tuple[str, str, torch.dtype], capsys) -> None:
    """bench tune, with the interpreter in place of the GPU: warps and stages are nothing to it."""
    tiles = list({tile.block_n: tile for tile in tune.candidates(*key[1:])}.values())
    dim, options = 16 if configurations.takes_products(key[1]) else 3, {"size": 3, "rounds": 1, "device": "cpu"}
    assert list(tune.measure(*key, dim, tiles, **options)) == tiles
    assert capsys.readouterr().out == ""


# What the backend says where it cannot run


def test_a_status_says_what_is_missing() -> None:
    status = backends._triton_status.__wrapped__
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert status() == (False, "the package triton is not installed: pip install triton")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert not status().available
    with mock.patch("importlib.util.find_spec"), mock.patch.object(torch.cuda, "is_available", return_value=True):
        with mock.patch.object(torch.version, "hip", "6.0"):
            assert "NVIDIA" in status().reason
        capability = {"get_device_capability": lambda: (7, 5), "get_device_name": lambda: "T4"}
        with mock.patch.multiple(torch.cuda, **capability), mock.patch.object(torch.version, "hip", None):
            assert "8.0 or later is needed, T4 has 7.5" in status().reason


def test_cpu_tensors_are_refused() -> None:
    with (
        mock.patch.dict(backends._STATUS, triton=lambda: backends.BackendStatus(True, "")),
        pytest.raises(RuntimeError, match='backend "triton" computes on CUDA tensors, got cpu'),
    ):
        backends._resolve.__wrapped__("triton", torch.device("cpu"), ())


@pytest.mark.parametrize(("available", "chosen"), [(("cuda", "triton"), "cuda"), (("triton",), "triton")])
def test_auto_on_a_gpu_takes_the_best_one(available: tuple[str, ...], chosen: str) -> None:
    statuses = {name: (lambda name=name: backends.BackendStatus(name in available, "")) for name in ("cuda", "triton")}
    with (
        mock.patch.dict(backends._STATUS, statuses),
        mock.patch.object(backends, "_missing_kernels", return_value=""),
        mock.patch("importlib.import_module") as load,
    ):
        backends._resolve.__wrapped__("auto", torch.device("cuda"), ("cuda", "triton"))
    load.assert_called_once_with(f"csdiv.backends.{chosen}")


@pytest.mark.parametrize(
    ("shape", "device", "order"),
    [
        (backends.Shape(2048, 512, 16, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "tied"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "tied rows"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 15, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 511, 16, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16), "cuda", ("cuda", "triton")),
        (backends.Shape(), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "spherical"), "cpu", ("cpu",)),
        (backends.Shape(2048, 512, 16, "spherical"), "mps", ()),
    ],
)
def test_auto_takes_the_first_line_of_the_table_that_applies(
    shape: backends.Shape, device: str, order: tuple[str, ...]
) -> None:
    assert backends.order_of(device, shape) == order
    with mock.patch.object(backends, "_resolve") as taken:
        backends.resolve("auto", torch.device(device), shape)
    taken.assert_called_once_with("auto", torch.device(device), order)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (
            backends.Shape(9, 9, 64, "tied"),
            "tied matrix in float32: matrix products, .*; tied in float64: the sum of sq.*",
        ),
        (backends.Shape(9, 9, 64, "spherical"), "spherical matrix in float32: matrix products, .*"),
        (backends.Shape(9, 9, 15, "tied"), "tied in float32: the sum of squares, as D < 16; .*"),
        (backends.Shape(9, 9, 64), "diagonal, .*"),
    ],
)
def test_the_explanation_names_the_form(shape: backends.Shape, form: str) -> None:
    assert re.fullmatch(form, backends._form("triton", shape))
    assert backends._form("cuda", shape).startswith("diagonal, ")


@pytest.mark.parametrize(("structure", "name"), [("spherical", "spherical"), ("tied diagonal", "tied")])
@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "self_overlap", "component_log_overlap"])
def test_both_directions_ask_for_the_same_shape(entry: str, structure: str, name: str) -> None:
    """What the forward pass saves is read by the same backend."""
    p, q = (testing.random_mixture(k, 3, structure=structure).map(lambda t: t.requires_grad_()) for k in (4, 5))
    with mock.patch.object(backends, "resolve", wraps=backends.resolve) as asked, gradients_later():
        value = call(entry, "auto")(p, q)
        value.backward(torch.arange(float(value.numel())).view(value.shape))
    shapes = {arguments.args[2] for arguments in asked.call_args_list}
    assert len(asked.call_args_list) > 1
    assert shapes == {backends.Shape(4, 4 if entry == "self_overlap" else 5, 3, name)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch may import triton for a GPU")
def test_nothing_of_triton_is_imported_without_need() -> None:
    code = "import csdiv, csdiv.kernels, sys; csdiv.backend_status(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Machine code


def compiled(
    capability: int, scalar: str, forms: str = "[:1]", batches: str = "(static_triton.ALONE,)", only: str = ""
) -> list[dict[str, Any]]:
    """What the launches cost whose names match ``only``; more shared memory than there is would be an error."""
    code = f"""if True:
        import json, re
        from bench import static, static_triton
        launches = static_triton.launches(({scalar!r},), {batches}, static_triton.FORMS{forms})
        launches = [launch for launch in launches if re.search({only!r}, launch.name)]
        print(json.dumps(static.records([static_triton.compiled(launch, {capability}) for launch in launches])))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


KERNELS = {
    "scale_kernel", "pack_kernel", "row_sums_kernel", "combine_rows_kernel", "total_kernel", "cs_divergence_kernel",
    "gradient_sweep_kernel", "pairwise_forward_kernel", "assign_kernel",
}  # fmt: skip


@needs_triton
def test_what_an_element_costs_in_float32() -> None:
    rows = compiled(90, "float")
    assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in rows} == KERNELS
    assert [row for row in rows if row["local_memory_bytes"] or row["registers"] > 255] == []
    loops = [row for row in rows if "loop" in row]
    assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in loops} == {
        "row_sums_kernel", "gradient_sweep_kernel", "pairwise_forward_kernel", "assign_kernel",
    }  # fmt: skip
    for row in loops:
        limit = {"logits": 7.5, "gradients": 9.5}[row["loop"]]
        assert row["instructions_per_element"] <= limit, row
        assert row["special_per_element"] == {"logits": 0.5, "gradients": 1.0}[row["loop"]]


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_without_local_memory() -> None:
    """For three architectures, and with the variants of a batch for one of them."""
    alone = [(80, "float"), (80, "double"), (90, "double"), (100, "float"), (100, "double")]
    with ThreadPoolExecutor(2) as pool:
        batches = pool.submit(compiled, 90, "float", "[:1]", "static_triton.SHARED")
        found = list(pool.map(lambda kind: compiled(*kind), alone))
    for rows in found:
        assert {row["kernel"].removeprefix("triton ").split("<")[0] for row in rows} == KERNELS
    for row in (row for rows in (*found, batches.result()) for row in rows):
        assert row["local_memory_bytes"] == 0, row
        assert row["registers"] <= 255, row


FORM_LIMITS = {
    "spherical": {"spherical matrix logits": 1.3, "spherical logits": 3.3, "spherical gradients": 2.9},
    "tied": {"tied matrix logits": 1.6, "tied logits": 4.8, "tied gradients": 6.1},
    "tied rows": {"tied rows logits": 4.4, "tied rows gradients": 6.1},
}
"""Instructions of an element, as docs/kernels.md has them."""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("structure", FORM_LIMITS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_of_other_forms_compile_without_local_memory(capability: int, structure: str) -> None:
    """Of each form the kernels, one variant each: all of them would take minutes for an architecture."""
    form, plain = f"float, {structure}( matrix)?(?! rows)", "(row_sums|assign|pairwise_forward)"
    only = rf"{plain}_kernel<{form}>|gradient_sweep_kernel<{form}, DIMENSIONS, no factors, no given>"
    rows = compiled(capability, "float", "[1:]", only=only)
    names = sorted({row["kernel"].removeprefix("triton ") for row in rows})
    kernels = ("assign", "gradient_sweep", "pairwise_forward", "row_sums")
    with_products = kernels[1::2] if structure in configurations.PRODUCTS else ()
    assert {tuple(name.rstrip(">").split(", ")[:2]) for name in names} == {
        *((f"{kernel}_kernel<float", structure) for kernel in kernels),
        *((f"{kernel}_kernel<float", f"{structure} matrix") for kernel in with_products),
    }
    assert [row for row in rows if row["local_memory_bytes"] or row["registers"] > 255] == []
    for row in (row for row in rows if "loop" in row):
        assert row["instructions_per_element"] <= FORM_LIMITS[structure][row["loop"]], row
    if capability == 90:
        assert {row["loop"] for row in rows if "loop" in row} == set(FORM_LIMITS[structure])
