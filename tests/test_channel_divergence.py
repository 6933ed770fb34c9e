"""Channels compared with each other, of one mixture or two, with linear weights and hard labels."""

import math
from typing import Any

import emulation
import pytest
import torch
from distance_inputs import close, mixture, on_every_backend
from entries import BACKENDS, WITH_FULL
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, reference, weightings

WAYS = (weightings.ONE, weightings.EACH, weightings.SPLIT)
PAIRED = [(s, b) for s in ("diagonal", "tied spherical", "tied full", "full") for b in BACKENDS]
PAIRED = [(s, b) for s, b in PAIRED if b in WITH_FULL or "full" not in s]
on_every_structure = pytest.mark.parametrize(("structure", "backend"), PAIRED)


@pytest.fixture(params=(*WAYS, "small"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way over the pairs for every call; a batch, which cannot be split, takes one pass."""

    def chosen(p: GaussianMixture, q: GaussianMixture, route: Any) -> str:
        split = request.param == weightings.SPLIT and weightings._can_be_split(p) and weightings._can_be_split(q)
        one = route.eager or (request.param == weightings.SPLIT and not split)
        return weightings.ONE if one else request.param

    if request.param != "small":
        monkeypatch.setattr(weightings, "_way", chosen)
        monkeypatch.setattr(weightings, "SMALL", (0, 0))
    return request.param


def products(p: GaussianMixture, q: GaussianMixture, a: Tensor, b: Tensor) -> Tensor:
    """log V by a plain formula: linear weights times densities."""
    pairwise = csdiv.pairwise_log_overlap(p, q, backend="reference")
    scale = pairwise.detach().amax()
    return (a @ (pairwise - scale).exp() @ b.mT).log() + scale


def divergences(p: GaussianMixture, q: GaussianMixture, a: Tensor, b: Tensor) -> Tensor:
    own = [products(side, side, w, w).diagonal(dim1=-2, dim2=-1) for side, w in ((p, a), (q, b))]
    return 0.5 * (own[0].unsqueeze(-1) + own[1].unsqueeze(-2)) - products(p, q, a, b)


def weights(channels: int, k: int, *zeros: tuple[int, int], **options: Any) -> Tensor:
    result = torch.rand(channels, k, **{"dtype": torch.float64} | options) + 0.1
    for at in zeros:
        result[at] = 0.0
    return result.requires_grad_()


def check(found: Tensor, expected: Tensor, leaves: list[Tensor], **tolerance: float) -> None:
    """Values and gradients, with an upstream gradient of its own for each pair."""
    close(found, expected.to(found.dtype), **tolerance)
    upstream = torch.linspace(-1.0, 2.0, found.numel(), dtype=found.dtype).view_as(found)
    grads = torch.autograd.grad(found, leaves, upstream)
    close(grads, torch.autograd.grad(expected, leaves, upstream.to(expected.dtype)), **tolerance)


def leaves_of(*sides: GaussianMixture) -> tuple[list[GaussianMixture], list[Tensor]]:
    sides = tuple(side.map(lambda t: t.detach().clone().requires_grad_()) for side in sides)
    return list(sides), [t for s in sides for t in (s.means, s.variances, s.matrices) if t is not None]


@on_every_structure
@pytest.mark.usefixtures("way")
def test_channel_divergences_of_two_mixtures(structure: str, backend: str) -> None:
    (p, q), leaves = leaves_of(mixture(structure=structure), mixture(6))
    a, b = weights(3, 4, (0, 1)), weights(2, 6, (1, 2), (1, 3))
    found = csdiv.channel_cs_divergence(p, q, p_weights=a, q_weights=b, backend=backend)
    check(found, divergences(p, q, a, b), [*leaves, a, b])


@on_every_structure
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_one_mixture(channels: int, structure: str, backend: str) -> None:
    """With each other: the same values as of two equal ones, in half the pairs; with other channels of it as well."""
    (p,), leaves = leaves_of(mixture(7, structure=structure))
    a, b = weights(channels, 7, (0, 1), (0, 6)), weights(2, 7, (1, 2))
    check(csdiv.channel_log_overlap(p, p_weights=a, backend=backend), products(p, p, a, a), [*leaves, a])
    found = csdiv.channel_cs_divergence(p, p, p_weights=a, q_weights=a, backend=backend)
    check(found, divergences(p, p, a, a), [*leaves, a])
    assert not found.diagonal().any()
    logs = [t.detach().log().requires_grad_() for t in (a, b)]
    check(csdiv.channel_cs_divergence(p, p, *logs, backend=backend), divergences(p, p, a, b), leaves)
    check(csdiv.channel_cs_divergence(p, None, logs[0], q_weights=b, backend=backend), divergences(p, p, a, b), leaves)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channel_divergences_near_zero_in_many_dimensions(dtype: torch.dtype, backend: str) -> None:
    """log V is about -2600 nats, where a float32 has steps of 2.4e-4."""
    means = torch.zeros(2, 2048, dtype=dtype)
    means[1, 0] = 2.0
    a = torch.tensor([[0.5, 0.5], [0.51, 0.49]], dtype=dtype)
    for shape in ((1, 1), (2, 2048)):
        p, other = (GaussianMixture(means.clone(), torch.ones(shape)) for _ in range(2))
        wide, gram = a.double(), torch.tensor([[1.0, math.exp(-1.0)], [math.exp(-1.0), 1.0]], dtype=torch.float64)
        v = wide @ gram @ wide.mT
        exact = -math.log(v[0, 1] / math.sqrt(v[0, 0] * v[1, 1]))
        assert 6.0e-5 < exact < 1.2e-4
        for found in (
            csdiv.channel_cs_divergence(p, None, p_weights=a, backend=backend),
            csdiv.channel_cs_divergence(p, other, p_weights=a, q_weights=a.clone(), backend=backend),
        ):
            assert found.dtype == dtype
            close(found.double(), exact * torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), rtol=0.0, atol=4e-7)


@on_every_backend
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1.0, 30.0])
def test_channels_with_linear_weights_of_zero(distance: float, dtype: torch.dtype, backend: str) -> None:
    """Derivatives there, also where shares are as small as e^-900."""
    means = distance * torch.arange(5, dtype=torch.float64).unsqueeze(-1) + torch.tensor([0.0, 0.3])
    p, q = (GaussianMixture((s * means).to(dtype), torch.full((1, 1), 0.5, dtype=dtype)) for s in (1.0, 1.01))
    one_hot = torch.eye(5, dtype=dtype)
    a, b = one_hot.clone().requires_grad_(), (one_hot[:3] + one_hot[1:4]).requires_grad_()
    found = csdiv.channel_log_overlap(p, q, p_weights=a, q_weights=b, backend=backend)
    pairwise = csdiv.pairwise_log_overlap(p.to(torch.float64), q.to(torch.float64), backend="reference")
    log_a, log_b = a.detach().double().log(), b.detach().double().log()
    rows = torch.logsumexp(pairwise.unsqueeze(-3) + log_b.unsqueeze(-2), -1)  # (C', N)
    columns = torch.logsumexp(pairwise.mT.unsqueeze(-3) + log_a.unsqueeze(-2), -1)  # (C, M)
    values = torch.logsumexp(rows.unsqueeze(-3) + log_a.unsqueeze(-2), -1)  # (C, C')
    close(found, values.to(dtype), rtol=1e-5, atol=1e-5)
    c, e = 2, 1
    grads = torch.autograd.grad(found[c, e], [a, b])
    close(grads[0][c].double(), (rows[e] - values[c, e]).exp(), rtol=1e-4, atol=1e-30)
    close(grads[1][e].double(), (columns[c] - values[c, e]).exp(), rtol=1e-4, atol=1e-30)


def test_channels_with_linear_weights_take_one_kind_for_each_side() -> None:
    p, q, a, b = mixture(), mixture(7), weights(2, 4), weights(3, 7)
    close(
        csdiv.channel_log_overlap(p, q, a.log(), q_weights=b, backend="cpu"),
        csdiv.channel_log_overlap(p, q, p_weights=a, q_log_weights=b.log(), backend="reference"),
    )
    for given in ({"p_weights": a}, {"q_weights": b}, {"p_weights": a, "p_log_weights": a, "q_weights": b}):
        with pytest.raises(ValueError, match="exactly one of"):
            csdiv.channel_log_overlap(p, q, **given)
    half = csdiv.channel_log_overlap(p.to(torch.float16), q.to(torch.float16), p_weights=a.half(), q_weights=b.half())
    assert half.dtype == torch.float32
    negative = -a
    assert csdiv.channel_log_overlap(p, q, p_weights=negative, q_weights=b).isnan().all()


@on_every_backend
@pytest.mark.usefixtures("way")
def test_channels_of_hard_labels(backend: str) -> None:
    """Labels in any order, a class without components, and one whose components are all padding."""
    (p, q), leaves = leaves_of(mixture(9), mixture(8))
    labels = [torch.tensor([2, 0, 2, 1, 0, 2, 0, 1, 1]), torch.tensor([1, 1, 3, 0, 3, 0, 1, 3])]
    a, b = (torch.nn.functional.one_hot(t, 4).mT.double() for t in labels)
    found = csdiv.channel_log_overlap(p, q, a.log(), b.log(), backend=backend)
    assert (found[3] == -math.inf).all()
    assert (found[:, 2] == -math.inf).all()
    present = [0, 1, 3]
    check(found[:3, present], products(p, q, a[:3], b[present]), leaves)
    check(
        csdiv.channel_log_overlap(p, None, a.log(), backend=backend)[:3, :3], products(p, p, a[:3], a[:3]), leaves[:2]
    )


class Counted:
    """Pairs of components that a backend goes over."""

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        chosen, self.pairs = backends.resolve(backend, torch.device("cpu")), 0
        plain = chosen.forward

        def counted(name: str, tensors: Any, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
            n = tensors[0].shape[-2]
            self.pairs += n * n // 2 if name == "self_overlap" else n * tensors[3 if "log_w" in name else 2].shape[-2]
            return plain(name, tensors, *arguments)

        monkeypatch.setattr(chosen, "forward", counted)


@pytest.mark.parametrize("backend", ["cpu", emulation.NAME])
def test_channels_of_one_mixture_go_over_half_of_the_pairs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weightings, "_way", lambda *arguments: weightings.ONE)
    monkeypatch.setattr(weightings, "SMALL", (0, 0))
    monkeypatch.setattr("csdiv.channels.TILE_ROWS", 8)
    monkeypatch.setattr("csdiv.channels.TILE", 8 * 200)
    counted = Counted(backend, monkeypatch)
    p = mixture(200, 3)
    csdiv.channel_cs_divergence(p, None, torch.randn(4, 200, dtype=torch.float64), backend=backend)
    assert counted.pairs <= 0.5 * 200 * (200 + 8)


def test_channels_take_the_way_that_costs_least() -> None:
    p = mixture(5000, 10, dtype=torch.float32)
    hard = torch.nn.functional.one_hot(torch.arange(5000) % 5).mT.float().log()
    soft, few = torch.randn(5, 5000), torch.randn(1, 5000)
    for given, expected in ((hard, WAYS[2]), (soft, WAYS[0]), (few, WAYS[2])):
        q = weightings._with_channels(p, given, None, "p")
        assert weightings._way(q, q, csdiv.pairs.route(q, q, "cpu")) == expected


@pytest.mark.usefixtures("way")
def test_channels_in_tiles_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,), leaves = leaves_of(mixture(9))
    a = weights(3, 9, (1, 8))
    expected = divergences(p, p, a, a)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16)
    check(csdiv.channel_cs_divergence(p, p_weights=a), expected, [*leaves, a])


@on_every_backend
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("distance", [18.0, 40.0])
def test_channels_in_float32_whose_sums_underflow_there(distance: float, backend: str) -> None:
    """Terms e^-162 and e^-800 of the largest: as float64 exponentials, and as logarithms."""
    means = distance * torch.arange(4, dtype=torch.float32).unsqueeze(-1) + torch.rand(4, 2)
    (p,), leaves = leaves_of(GaussianMixture(means, torch.full((1, 1), 0.5)))
    labels = torch.eye(4).log().clamp(min=-300.0)
    found = csdiv.channel_log_overlap(p, None, labels, backend=backend)
    (wide,), wide_leaves = leaves_of(p.to(torch.float64))
    pairwise = csdiv.pairwise_log_overlap(wide, wide, backend="reference") + labels.double()[:, None, :, None]
    expected = torch.logsumexp((pairwise + labels.double()[None, :, None, :]).flatten(-2), -1)
    close(found.double(), expected, rtol=1e-6, atol=1e-5)
    upstream = torch.linspace(-1.0, 2.0, 16).view(4, 4)
    grads = torch.autograd.grad(found, leaves, upstream)
    exact = torch.autograd.grad(expected, wide_leaves, upstream.double())
    close([g.double() for g in grads], list(exact), rtol=1e-4, atol=1e-4)
