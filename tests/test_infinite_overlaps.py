"""Points at one place: an overlap is +inf wherever the pair lies, whatever else is in the sum."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from bad_inputs import gradients_are_finite, on_every_backend, on_every_dtype, tensors, with_gradients
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import _C, GaussianMixture

Divergence = Callable[..., Tensor]

PLACES = [(2, 0), (2, 1), (17, 15), (17, 16), (65, 63), (65, 64)]
"""Components, and which of them is a point: first, last, on both sides of a tile's end."""
MANY = [(1100, place) for place in (0, 15, 16, 255, 256, 257, 1023, 1024, 1099)] + [(3000, 2047), (3000, 2999)]


def with_points(k: int, *places: int, dim: int = 1, columns: int = 1, **options: torch.dtype) -> GaussianMixture:
    """k components, unit distances apart, those at ``places`` of variance zero."""
    means = torch.arange(k, **options).unsqueeze(-1) * torch.eye(1, dim, **options)
    variances = torch.ones(k, columns, **options)
    variances[list(places)] = 0.0
    return GaussianMixture(means, variances, log_weights=torch.linspace(-1.0, 0.0, k, **options))


def ordinary(k: int, dim: int = 1, **options: torch.dtype) -> GaussianMixture:
    return GaussianMixture(
        torch.linspace(0.0, float(k), 7, **options)[:, None].expand(7, dim), torch.ones(7, 1, **options)
    )


def check_every_overlap(p: GaussianMixture, place: int, backend: str) -> None:
    """p has one point, at ``place``."""
    q = ordinary(p.num_components, p.dim, dtype=p.dtype)
    assert csdiv.log_overlap(p, backend=backend) == math.inf
    assert csdiv.log_overlap(p, p.map(torch.clone), backend=backend) == math.inf
    assert csdiv.log_overlap(p, q, backend=backend).isfinite()
    assert csdiv.cs_divergence(p, q, backend=backend) == math.inf
    assert csdiv.cs_divergence(q, p, backend=backend) == math.inf
    expected = torch.arange(p.num_components) == place
    for rows in (csdiv.component_log_overlap(p, p, backend=backend), p.log_prob(p.means, backend=backend)):
        assert torch.equal(rows == math.inf, expected)
        assert rows[~expected].isfinite().all()


@on_every_backend
@on_every_dtype
@pytest.mark.parametrize(("k", "place"), PLACES)
def test_infinite_overlap_wherever_the_point_is(k: int, place: int, dtype: torch.dtype, backend: str) -> None:
    check_every_overlap(with_points(k, place, dtype=dtype), place, backend)


@pytest.mark.parametrize("dim", [1, 20])
@pytest.mark.parametrize(("k", "place"), MANY)
def test_infinite_overlap_wherever_the_point_is_among_many(k: int, place: int, dim: int) -> None:
    p = with_points(k, place, dim=dim)
    p.map(torch.Tensor.requires_grad_)  # values with their gradients take another path
    check_every_overlap(p, place, "cpu")
    check_every_overlap(p.detach(), place, "cpu")


@on_every_backend
@pytest.mark.parametrize("columns", [1, 20])
def test_infinite_overlap_of_structured_components(columns: int, backend: str) -> None:
    """Tiles without the point take the short forms for spherical and tied components."""
    for place in (0, 16, 69):
        p = with_points(70, place, dim=20, columns=columns)
        check_every_overlap(p, place, backend)
    points = GaussianMixture(p.means, torch.zeros(1, columns))
    assert csdiv.log_overlap(points, backend=backend) == math.inf
    assert csdiv.log_overlap(points, p, backend=backend) == math.inf
    assert csdiv.log_overlap(p, points, backend=backend) == math.inf


@pytest.mark.parametrize("name", _C.cpu_isas())
def test_infinite_overlap_on_every_instruction_set(name: str, isa: Callable[[str], None]) -> None:
    isa(name)
    for k, place in PLACES:
        check_every_overlap(with_points(k, place), place, "cpu")


@on_every_backend
def test_undefined_stays_undefined_beside_infinite(backend: str) -> None:
    for variances in itertools.permutations((0.0, 1.0, math.nan)):
        p = GaussianMixture(torch.arange(3.0)[:, None], torch.tensor(variances)[:, None])
        for q in (p.map(torch.clone), ordinary(3)):
            assert csdiv.log_overlap(p, q, backend=backend).isnan()
            assert csdiv.log_overlap(q, p, backend=backend).isnan()
            assert csdiv.cs_divergence(p, q, backend=backend).isnan()
            assert csdiv.component_log_overlap(q, p, backend=backend).isnan().all()
        assert csdiv.log_overlap(p, backend=backend).isnan()


@on_every_backend
@pytest.mark.parametrize(("k", "place"), PLACES)
def test_infinite_overlap_of_a_component_without_weight_is_not_there(k: int, place: int, backend: str) -> None:
    p = with_points(k, place)
    p.log_weights[place] = -math.inf
    kept = torch.arange(k) != place
    without = p.map(lambda t: t[kept])
    for function in (
        lambda p: csdiv.log_overlap(p, backend=backend),
        lambda p: csdiv.log_overlap(p, p, backend=backend),
    ):
        torch.testing.assert_close(function(p), function(without))
    assert csdiv.component_log_overlap(p, p, backend=backend).isfinite().all()
    leaves = with_gradients(p)
    assert gradients_are_finite(csdiv.cs_divergence(leaves, ordinary(k), backend=backend), leaves)


@on_every_backend
def test_infinite_overlap_of_distances(backend: str) -> None:
    """−log V(p, q) + ½ log V(p, p) + ½ log V(q, q) is +inf, unless V(p, q) is infinite too: then nothing is known."""
    p, q, far = with_points(5, 0), ordinary(5), GaussianMixture(torch.full((1, 1), 1e20), torch.ones(1, 1))
    for a, b in ((p, q), (q, p), (p, far), (far, p)):
        assert csdiv.cs_divergence(a, b, backend=backend) == math.inf
        assert csdiv.cosine_similarity(a, b, backend=backend) == 0.0
        assert csdiv.ise(a, b, backend=backend) == math.inf
        assert csdiv.ise(a, b, log=True, backend=backend) == math.inf
        assert csdiv.nise(a, b, backend=backend) == 1.0
        leaves = with_gradients(a), with_gradients(b)
        assert gradients_are_finite(csdiv.nise(*leaves, backend=backend), *leaves)
    assert csdiv.mmd2(p, q, 1.0, backend=backend).isfinite()
    assert csdiv.renyi2_entropy(p, backend=backend) == -math.inf
    assert (csdiv.cs_regularizer(torch.zeros(2, 1), torch.zeros(2, 1), p, backend=backend) == math.inf).all()
    for function in (csdiv.cs_divergence, csdiv.ise, csdiv.nise, csdiv.cosine_similarity):
        assert function(p, with_points(5, 0), backend=backend).isnan()
    both = with_points(5, 4)
    assert csdiv.nise(p, both, backend=backend) == 1.0
    assert csdiv.cs_divergence(p, both, backend=backend) == math.inf


@on_every_backend
def test_infinite_overlap_of_channels(backend: str) -> None:
    p = with_points(5, 2)
    weights = torch.zeros(2, 5)
    weights[1, 2] = -math.inf
    value = csdiv.channel_log_overlap(p, p, weights, weights, backend=backend)
    assert (value == math.inf).tolist() == [[True, False], [False, False]]
    assert value.flatten()[1:].isfinite().all()


@on_every_backend
def test_responsibilities_of_a_point_that_is_met(backend: str) -> None:
    p = with_points(4, 1, 3)
    r = p.responsibilities(p.means, backend=backend)
    assert r[1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert r[3].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert p.assign(p.means, backend=backend).tolist() == [0, 1, 2, 3]
    double = GaussianMixture(p.means[[1, 1, 0]], p.variances[[1, 1, 0]])
    assert double.responsibilities(p.means[1:2], backend=backend).tolist() == [[0.5, 0.5, 0.0]]


def gradients(function: Divergence, *sides: GaussianMixture) -> list[Tensor]:
    leaves = [with_gradients(side) for side in sides]
    inputs = [t for side in leaves for t in tensors(side)]
    return list(torch.autograd.grad(function(*leaves).sum(), inputs, materialize_grads=True))


@on_every_backend
@pytest.mark.parametrize("place", [0, 1, 69])
def test_gradients_of_an_infinite_sum_are_zero(place: int, backend: str) -> None:
    p, q = with_points(70, place), ordinary(70)
    for function, sides in (
        (lambda p: csdiv.log_overlap(p, backend=backend), [p]),
        (lambda p, q: csdiv.log_overlap(p, q, backend=backend), [p, p.map(torch.clone)]),
        (lambda p, q: csdiv.component_log_overlap(p, q, backend=backend)[place], [p, p.map(torch.clone)]),
        (lambda p: p.log_prob(p.means.detach(), backend=backend)[place], [p]),
        (lambda p, q: csdiv.pairwise_log_overlap(p, q, backend=backend)[place, place], [p, p.map(torch.clone)]),
        (lambda p, q: csdiv.ise(p, q, backend=backend), [p, q]),
    ):
        assert not any(g.any() for g in gradients(function, *sides))
    # Other rows, pairs and terms have what they have without it.
    others = torch.arange(70) != place
    for value in (csdiv.component_log_overlap, csdiv.pairwise_log_overlap):
        whole, rest = (
            gradients(lambda p, q, k=k, value=value: value(p, q, backend=backend)[k], p, p.map(torch.clone))
            for k in (slice(70), others)
        )
        if value is csdiv.component_log_overlap:
            torch.testing.assert_close(whole, rest)
        assert all(g.isfinite().all() for g in whole)
    whole = gradients(lambda p, q: csdiv.cs_divergence(p, q, backend=backend), p, q)
    own = gradients(lambda p, q: 0.5 * csdiv.log_overlap(q) - csdiv.log_overlap(p, q, backend=backend), p, q)
    torch.testing.assert_close(whole, own, rtol=1e-4, atol=1e-6)


def test_infinite_overlap_in_a_batch_of_tiny_mixtures() -> None:
    means, variances = torch.randn(40, 3, 2), torch.rand(40, 3, 2) + 0.5
    q = GaussianMixture(torch.randn(40, 4, 2), torch.rand(40, 4, 2) + 0.5)
    expected = csdiv.cs_divergence(GaussianMixture(means, variances), q)
    variances[17, 1] = 0.0
    p = with_gradients(GaussianMixture(means, variances))
    value = csdiv.cs_divergence(p, q)
    assert value[17] == math.inf
    others = torch.arange(40) != 17
    torch.testing.assert_close(value[others], expected[others])
    assert gradients_are_finite(value, p)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_infinite_overlap_is_the_same_for_any_number_of_threads(backend: str) -> None:
    p = with_points(200, 3, 150)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(csdiv.component_log_overlap(p, p, backend=backend))
            assert csdiv.log_overlap(p, backend=backend) == math.inf
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
