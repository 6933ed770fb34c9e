"""The forms of the Triton kernels' pair term: which one is taken, and what it is right for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from unittest import mock

import pytest
import test_kernels_edges
import torch
from triton_marks import NAME, interpreted

import csdiv
from csdiv import GaussianMixture, testing
from csdiv.kernels import configurations

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


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
    p, q = (GaussianMixture(side.means + shift, side.variances, log_weights=side.log_weights) for side in (p, q))
    test_kernels_edges.check("component_log_overlap", NAME, p, q)
    assert not direct_sums


@interpreted
@pytest.mark.parametrize(("spread", "direct"), [(0.2, False), (1.0, True), (10.0, True), (100.0, True)])
@pytest.mark.parametrize("structure", ["spherical", "tied diagonal"])
def test_near_pairs_take_the_direct_form(structure: str, spread: float, direct: bool, direct_sums: list[int]) -> None:
    """Unless all of the tile is near, against the variances."""
    q = testing.random_mixture(5, 32, structure=structure, spread=spread)
    p = GaussianMixture(q.means[:4] + 0.1, q.variances[:4], log_weights=q.log_weights[:4])
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
    arrays, module = (importlib.import_module(f"csdiv.backends.{name}") for name in ("arrays", "triton"))
    sides = []
    for name, batch in zip((p, q), batches, strict=True):
        variances = torch.ones(*(batch if name != "points" else ()), *SHAPES[name])
        sides.append(arrays.make_side(False, torch.zeros(*batch, 3, 2), variances))
    problem = module._packed(arrays.flattened(arrays.Problem(*sides)))
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
        GaussianMixture(
            (side.means + 50) * 2.0 ** (exponent // 2), side.variances * 2.0**exponent, log_weights=side.log_weights
        )
        for side in (testing.random_mixture(k, dim, structure="tied diagonal", spread=3.0) for k in (4, 5))
    )
    silent = torch.tensor([0, 2])
    means, log_weights = (t.index_fill(0, silent, x) for t, x in ((q.means, torch.nan), (q.log_weights, -torch.inf)))
    q = GaussianMixture(means, q.variances, log_weights=log_weights)
    fewer = GaussianMixture(means[[1, 3, 4]], q.variances, log_weights=log_weights[[1, 3, 4]])
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
            side = GaussianMixture(leaves[0], own_variances.expand(own, dim), log_weights=p.log_weights)
            spoilt = GaussianMixture(leaves[1], variances.expand(other, dim), log_weights=q.log_weights)
            total = csdiv.log_overlap(spoilt, side, backend=NAME)
            found.append([total, *torch.autograd.grad(total, leaves)])
        for values in found[1:]:
            torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-6, equal_nan=True)
        assert bad >= 0 or bool(found[0][0].isnan())
        silent = GaussianMixture(q.means, variances, log_weights=torch.full((4,), -torch.inf))
        assert csdiv.log_overlap(side, silent, backend=NAME) == -torch.inf
