"""The error budget where an exponent has many terms: sums are blocked in every form of the pair term."""

from collections.abc import Callable

import pytest
import test_infinite_overlaps
import torch
from contract import Case, check
from entries import BACKENDS
from triton_marks import NAME, interpreted

import csdiv
from csdiv import _C, GaussianMixture, testing

PAIRS = [
    ("spherical", "spherical"),
    ("tied spherical", "spherical"),
    ("tied diagonal", "diagonal"),
    ("diagonal", "tied diagonal"),
    ("tied diagonal", "tied diagonal"),
    ("diagonal", "diagonal"),
]
"""One for each form: rows and columns."""


@pytest.mark.parametrize("structures", PAIRS, ids="-".join)
@pytest.mark.parametrize(("dim", "spread"), [(90, 10), (96, 1000), (127, 100), (133, 10), (140, 100), (260, 1000)])
def test_pairs_of_many_dimensions(dim: int, spread: int, structures: tuple[str, str]) -> None:
    """Of each pair by itself, where nothing averages out."""
    check(
        Case("pairwise_log_overlap", n=48, m=160, dim=dim, structures=structures, scale=f"spread {spread}", needs=()),
        "cpu",
    )


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("structures", PAIRS, ids="-".join)
@pytest.mark.parametrize(("dim", "spread"), [(133, 100), (256, 10)])
def test_gradients_of_many_dimensions(dim: int, spread: int, structures: tuple[str, str], backend: str) -> None:
    for entry in ("log_overlap", "component_log_overlap"):
        check(Case(entry, n=9, m=20, dim=dim, structures=structures, scale=f"spread {spread}"), backend)


@pytest.mark.parametrize("dim", [32, 127, 256])
@pytest.mark.parametrize("shift", [0.0, 0.7, 1.0, 1.4])
def test_products_of_means_that_share_a_direction(shift: float, dim: int) -> None:
    """Where x − m and y − m are near to each other their products cancel; two clusters of spread 100 about ±shift."""
    g = torch.Generator().manual_seed(dim)
    sides = []
    for _ in range(2):
        sign = torch.where(torch.rand(128, 1, generator=g) < 0.5, -1.0, 1.0)
        means = 100.0 * (shift * sign + torch.randn(128, dim, generator=g))
        sides.append(GaussianMixture(means, 10.0 ** (0.6 * torch.rand(128, 1, generator=g) - 0.3)))
    p, q = sides
    exact_p, exact_q = p.to(torch.float64), q.to(torch.float64)
    testing.assert_within_budget(
        csdiv.component_log_overlap(p, q, backend="cpu"),
        testing.eager("component_log_overlap", p, q),
        csdiv.component_log_overlap(exact_p, exact_q, backend="reference"),
        testing.band("component_log_overlap", exact_p, exact_q),
    )


@pytest.mark.parametrize("name", _C.cpu_isas())
@pytest.mark.parametrize("structures", PAIRS, ids="-".join)
def test_thousands_of_dimensions(structures: tuple[str, str], name: str, isa: Callable[[str], None]) -> None:
    """More than blocks of blocks."""
    isa(name)
    check(Case("pairwise_log_overlap", n=6, m=40, dim=4500, structures=structures, scale="spread 30", needs=()), "cpu")


@interpreted
@pytest.mark.parametrize("structures", PAIRS[:5], ids="-".join)
def test_pairs_of_many_dimensions_in_triton(structures: tuple[str, str]) -> None:
    check(Case("pairwise_log_overlap", n=16, m=64, dim=260, structures=structures, scale="spread 100", needs=()), NAME)


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_infinite_overlaps_in_triton() -> None:
    test_infinite_overlaps.test_infinite_overlap_wherever_the_point_is(17, 15, torch.float32, NAME)
    test_infinite_overlaps.test_undefined_stays_undefined_beside_infinite(NAME)
    test_infinite_overlaps.test_infinite_overlap_of_distances(NAME)
