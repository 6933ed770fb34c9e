"""Distances made from overlaps: ISE, NISE, MMD², the cosine and channels, against plain formulas and stated bounds."""

import itertools
import math
import subprocess
import sys
from typing import Any

import emulation
import pytest
import torch
from entries import BACKENDS, function
from test_mixture import covariances
from test_near_zero import BOUND, near_copies
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, distances, reference, testing

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
close = torch.testing.assert_close


def mixture(k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, **{"dtype": torch.float64} | options)


def overlaps(p: GaussianMixture, q: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """V(p, q), V(p, p), V(q, q) in float64 by the specification."""
    p, q = p.to(torch.float64), q.to(torch.float64)
    return tuple(csdiv.log_overlap(*pair, backend="reference").exp() for pair in ((p, q), (p, p), (q, q)))


def inputs_of(*sides: GaussianMixture) -> list[Tensor]:
    return [t for side in sides for t in side._tensors()]


# Values


@on_every_backend
@pytest.mark.parametrize("structure", [s for s in testing.STRUCTURES if s != "points"])
def test_distances_are_their_formulas(structure: str, backend: str) -> None:
    backend = "auto" if structure.endswith("full") else backend
    p, q = mixture(structure=structure, batch_shape=(2, 1)), mixture(6, batch_shape=(3,))
    q = GaussianMixture(q.means, q.variances, q.log_weights + 0.7)  # unnormalised
    pq, pp, qq = overlaps(p, q)
    ise = pp - 2.0 * pq + qq
    close(csdiv.ise(p, q, backend=backend), ise)
    close(csdiv.ise(p, q, log=True, backend=backend), ise.log())
    close(csdiv.nise(p, q, backend=backend), ise / (pp + qq))
    close(csdiv.cosine_similarity(p, q, backend=backend), pq / (pp * qq).sqrt())


@on_every_backend
@pytest.mark.parametrize("structure", [s for s in testing.STRUCTURES if s != "points"])
def test_mmd2_adds_the_squared_bandwidth_to_every_pair(structure: str, backend: str) -> None:
    backend = "auto" if structure.endswith("full") else backend
    p, q = mixture(structure=structure), mixture(6)

    def expectation(a: GaussianMixture, b: GaussianMixture, g: float) -> Tensor:
        """E k(x, y), x from a and y from b: k is a Gaussian without its factor, and x − y is a mixture."""
        differences = GaussianMixture(
            (a.means[:, None] - b.means).flatten(0, 1),
            covariance_matrix=(covariances(a)[:, None] + covariances(b)).flatten(0, 1),
            log_weights=(a.log_weights[:, None] + b.log_weights).flatten(),
        )
        origin = torch.zeros(1, 3, dtype=torch.float64)
        kernel = GaussianMixture(origin, torch.full_like(origin, g * g))
        return (2.0 * math.pi * g * g) ** 1.5 * csdiv.log_overlap(differences, kernel).exp()

    for g in (0.7, 2):
        expected = expectation(p, p, g) - 2.0 * expectation(p, q, g) + expectation(q, q, g)
        close(csdiv.mmd2(p, q, g, backend=backend), expected)
        close(csdiv.mmd2(p, q, g, log=True, backend=backend), expected.log())


@on_every_backend
def test_mmd2_of_points_is_the_biased_estimate(backend: str) -> None:
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(30, 3, dtype=torch.float64) + 0.5
    zero = torch.zeros(1, 1, dtype=torch.float64)
    bandwidths = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        return torch.stack([(-squares / (2.0 * g * g)).exp().mean() for g in bandwidths])

    found = csdiv.mmd2(GaussianMixture(x, zero), GaussianMixture(y, zero), bandwidths, backend=backend)
    close(found, kernel(x, x) - 2.0 * kernel(x, y) + kernel(y, y))


def test_mmd2_has_a_gradient_to_the_bandwidth() -> None:
    p, q = mixture(batch_shape=(2,)), mixture()
    bandwidth = torch.tensor([[0.5], [1.0], [4.0]], dtype=torch.float64, requires_grad=True)
    assert csdiv.mmd2(p, q, bandwidth).shape == (3, 2)
    assert torch.autograd.gradcheck(lambda g: csdiv.mmd2(p, q, g), [bandwidth])
    assert torch.autograd.gradcheck(lambda g: csdiv.mmd2(p, q, g, log=True), [bandwidth])


def test_poisson_processes_diverge_by_half_the_integrated_squared_error() -> None:
    """½ ∫ (u − v)² of two intensities by quadrature, D = 1."""
    u, v = mixture(3, 1), mixture(5, 1)
    u = GaussianMixture(u.means, u.variances, u.log_weights + math.log(2.5))
    x = torch.linspace(-15.0, 15.0, 4001, dtype=torch.float64)[:, None]
    squares = (u.log_prob(x).exp() - v.log_prob(x).exp()) ** 2
    close(0.5 * csdiv.ise(u, v), 0.5 * torch.trapezoid(squares, x[:, 0]), rtol=1e-9, atol=0.0)


# The error budget


FORMULAS = {
    "ise": lambda pq, pp, qq: pp.exp() - 2.0 * pq.exp() + qq.exp(),
    "log ise": lambda pq, pp, qq: (pp.exp() - 2.0 * pq.exp() + qq.exp()).log(),
    "nise": lambda pq, pp, qq: 1.0 - 2.0 * pq.exp() / (pp.exp() + qq.exp()),
    "mmd2": lambda pq, pp, qq: (2.0 * math.pi * 0.7**2) ** 2.5 * (pp.exp() - 2.0 * pq.exp() + qq.exp()),
    "cosine_similarity": lambda pq, pp, qq: (pq - 0.5 * (pp + qq)).exp(),
}
"""Each entry of entries.py as a function F of the three log overlaps, for D = 5."""


@on_every_backend
@pytest.mark.parametrize("entry", list(FORMULAS))
def test_values_and_gradients_stay_within_the_budget(entry: str, backend: str) -> None:
    """To first order errors δ_t of the overlaps L_t give Σ ∂F/∂L_t δ_t, in the gradient Σ ∂²F/∂L_t∂L_s δ_s ∂L_t."""
    p, q = (testing.random_mixture(k, 5) for k in (17, 31))
    q = GaussianMixture(q.means, q.variances, q.log_weights + 0.7)
    leaves = [t.requires_grad_() for t in inputs_of(p, q)]
    value = function(entry, backend)(*leaves)
    grads = torch.autograd.grad(value, leaves)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    added = 0.5 * 0.7**2 if entry == "mmd2" else 0.0
    a, b = GaussianMixture(wide[0], wide[1] + added, wide[2]), GaussianMixture(wide[3], wide[4] + added, wide[5])
    terms = {"log_overlap": (a, b), "self_overlap": (a, a), "self_overlap of q": (b, b)}
    logs = [csdiv.log_overlap(*pair, backend="reference") for pair in terms.values()]
    at = torch.stack(logs).detach()
    slopes = torch.func.grad(lambda x: FORMULAS[entry](*x))(at)
    curvature = torch.func.hessian(lambda x: FORMULAS[entry](*x))(at)
    options = {"scaled": backend != "reference"}
    names = [name.split()[0] for name in terms]
    bands = torch.stack([testing.band(n, *pair, **options) for n, pair in zip(names, terms.values(), strict=True)])

    exact = FORMULAS[entry](*logs)
    testing.assert_within_budget(value.detach(), exact.detach(), exact.detach(), slopes.abs() @ bands.detach())
    allowed = [torch.zeros_like(t) for t in wide]
    for t, (name, pair) in enumerate(zip(names, terms.values(), strict=True)):
        direct = testing.gradient_bands(name, *pair, slopes[t], wide, **options)
        first = torch.autograd.grad(logs[t], wide, retain_graph=True, materialize_grads=True)
        shift = curvature[t].abs() @ bands.detach()
        allowed = [x + d + shift * f.abs() for x, d, f in zip(allowed, direct, first, strict=True)]
    for actual, expected, limit in zip(grads, torch.autograd.grad(exact, wide), allowed, strict=True):
        testing.assert_within_budget(actual, expected, expected, limit)


# Where the terms cancel


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize(("dim", "size"), [(1, 5), (8, 60), (64, 30)])
def test_ise_near_zero_stays_within_the_stated_bound(backend: str, dim: int, size: int, distance: float) -> None:
    """Equation (13), with the stated bound of D_CS and the error budget of the self terms."""
    p, q = near_copies(dim, size, distance)
    wide = p.to(torch.float64), q.to(torch.float64)
    exact = csdiv.ise(*wide, backend="reference")
    pq, pp, qq = overlaps(p, q)
    scaled = backend != "reference"
    own = [testing.band("self_overlap", side, side, scaled=scaled) for side in wide]
    # the reference has no scale to take out, so its D_CS errs as its terms do
    together = BOUND[backend] * max(1.0, dim / 64) if scaled else testing.band("cs_divergence", *wide, scaled=False)
    bound = 2.0 * pq * together + exact.clamp(min=0.0).sqrt() * (pp.sqrt() * own[0] + qq.sqrt() * own[1])
    eps = torch.finfo(torch.float32).eps
    assert (csdiv.ise(p, q, backend=backend).double() - exact).abs() <= bound + eps * exact.abs()
    relative = bound / (pp + qq)
    assert (csdiv.nise(p, q, backend=backend).double() - exact / (pp + qq)).abs() <= relative + 2.0 * together
    log_ise = csdiv.ise(p, q, log=True, backend=backend).double().exp()
    assert (log_ise - exact).abs() <= bound + eps * exact.abs() * (1.0 + exact.log().nan_to_num(neginf=0.0).abs())


@on_every_backend
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_ise_in_float64_keeps_digits(distance: float, backend: str) -> None:
    """(p − q)² itself: a shift of one Gaussian in one dimension, ISE = 2V (1 − exp(−shift²/4s))."""
    s, d = 0.7, 5
    means = torch.zeros(1, d, dtype=torch.float64)
    shifted = means.clone()
    shifted[0, 2] = distance
    p, q = (GaussianMixture(m, torch.full((1, 1), s, dtype=torch.float64)) for m in (means, shifted))
    volume = (4.0 * math.pi * s) ** (-0.5 * d)
    expected = -2.0 * volume * math.expm1(-(distance**2) / (4.0 * s))
    error = (csdiv.ise(p, q, backend=backend) - expected).abs()
    assert error <= 4.0 * volume * testing.band("log_overlap", p, q, dtype=torch.float64, scaled=False)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_of_equal_mixtures(dtype: torch.dtype, backend: str) -> None:
    p = mixture(20, 5, dtype=dtype).map(lambda t: t.requires_grad_())
    q = p.map(lambda t: t.detach().clone().requires_grad_())
    unit = testing.band("cs_divergence", p.to(torch.float64), q.to(torch.float64), dtype=dtype, scaled=False).item()
    volume = csdiv.log_overlap(p.detach()).exp().item()
    for name, value, size in (
        ("ise", csdiv.ise(p, q, backend=backend), 4.0 * volume),
        ("nise", csdiv.nise(p, q, backend=backend), 2.0),
        ("mmd2", csdiv.mmd2(p, q, 1.0, backend=backend), 4.0),
        ("cosine_similarity", csdiv.cosine_similarity(p, q, backend=backend) - 1.0, 1.0),
    ):
        assert abs(value.item()) <= size * unit, name
        grads = torch.autograd.grad(value, inputs_of(p, q))
        if name == "ise":
            wide = [side.map(lambda t: t.detach().double().requires_grad_()) for side in (p, q)]
            bands = testing.gradient_bands(
                "cs_divergence", *wide, torch.tensor(2.0 * volume), inputs_of(*wide), dtype=dtype, scaled=False
            )
            assert all(bool((g.abs() <= b).all()) for g, b in zip(grads, bands, strict=True))
        assert all(bool(g.isfinite().all()) for g in grads)
    log_ise = csdiv.ise(p, q, log=True, backend=backend)
    assert log_ise.item() <= math.log(4.0 * volume * unit)
    if log_ise == -math.inf:
        assert not any(g.any() for g in torch.autograd.grad(log_ise, inputs_of(p, q)))


@on_every_backend
def test_log_of_an_ise_that_leaves_the_range(backend: str) -> None:
    """exp of 64 dimensions at variances of 1e∓3 leaves float32; the logarithm does not, nor do its gradients."""
    for variance, expected in ((1e-3, math.inf), (1e3, 0.0)):
        p, q = (mixture(5, 64, dtype=torch.float32, decades=0.1) for _ in range(2))
        p, q = (GaussianMixture(s.means, variance * s.variances, s.log_weights) for s in (p, q))
        assert csdiv.ise(p, q, backend=backend) == expected
        leaves = [side.map(lambda t: t.requires_grad_()) for side in (p, q)]
        value = csdiv.ise(*leaves, log=True, backend=backend)
        wide = p.to(torch.float64).detach(), q.to(torch.float64).detach()
        close(value.double(), csdiv.ise(*wide, log=True, backend="reference"), rtol=1e-5, atol=0.0)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, inputs_of(*leaves)))


# Limits


@on_every_backend
def test_distances_of_a_side_without_weight(backend: str) -> None:
    """The zero function: ∫ p² is left of the integrated squared error, and there is no angle."""
    p = mixture().map(lambda t: t.requires_grad_())
    zero = mixture(5)
    zero = GaussianMixture(zero.means, zero.variances, torch.full_like(zero.log_weights, -math.inf))
    volume = csdiv.log_overlap(p, backend=backend)
    for pair in ((p, zero), (zero, p)):
        for log in (False, True):
            value = csdiv.ise(*pair, log=log, backend=backend)
            close(value, volume if log else volume.exp())
            grads = [torch.autograd.grad(v, inputs_of(p), retain_graph=True) for v in (value, volume)]
            close(grads[0], tuple(g if log else g * value.detach() for g in grads[1]))
        close(csdiv.nise(*pair, backend=backend).item(), 1.0)
        assert csdiv.cosine_similarity(*pair, backend=backend).isnan()
    assert csdiv.ise(zero, zero, backend=backend) == 0.0
    assert csdiv.ise(zero, zero, log=True, backend=backend) == -math.inf
    assert csdiv.nise(zero, zero, backend=backend).isnan()


@on_every_backend
def test_distances_of_mixtures_far_apart(backend: str) -> None:
    p, q = mixture(dtype=torch.float32), mixture(5, dtype=torch.float32)
    q = GaussianMixture(q.means + 1e20, q.variances, q.log_weights)
    _, pp, qq = overlaps(p, q)
    leaves = [side.map(lambda t: t.requires_grad_()) for side in (p, q)]
    for value, expected in (
        (csdiv.ise(*leaves, backend=backend), pp + qq),
        (csdiv.nise(*leaves, backend=backend), torch.ones(())),
        (csdiv.cosine_similarity(*leaves, backend=backend), torch.zeros(())),
        (csdiv.ise(*leaves, log=True, backend=backend), (pp + qq).log()),
    ):
        close(value.double(), expected.double(), rtol=1e-5, atol=0.0)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(value, inputs_of(*leaves)))


# Channels


COSTS = {"one for all": (1, 0, 0), "one for each": (1, 2**40, 1)}
"""What makes each of the two ways the cheaper one."""


@pytest.fixture(params=list(COSTS))
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(distances, "COSTS", COSTS[request.param])
    return request.param


def value_and_gradients(p: GaussianMixture, q: GaussianMixture, a: Tensor, b: Tensor, **options: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (p.means, p.variances, q.means, q.variances, a, b)]
    sides = GaussianMixture(*leaves[:2]), GaussianMixture(*leaves[2:4])
    value = csdiv.channel_log_overlap(*sides, *leaves[4:], **options)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    return [value, *torch.autograd.grad(value, leaves, upstream)]


@on_every_backend
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("structure", ["diagonal", "tied spherical", "tied full", "full"])
@pytest.mark.parametrize("channels", [(2, 3), (3, 2), (1, 4)])
def test_channels_are_a_batch_of_mixtures(channels: tuple[int, int], structure: str, backend: str) -> None:
    backend = "auto" if structure == "full" else backend
    p, q = mixture(structure=structure, batch_shape=(2, 1)), mixture(7, batch_shape=(5,))
    a = torch.randn(channels[0], 4, dtype=torch.float64)
    b = torch.randn(5, channels[1], 7, dtype=torch.float64)
    a[0, 1] = b[1, 0, 2] = -math.inf
    leaves = [t.requires_grad_() for t in (p.means, q.means, q.variances, a, b)]
    found = csdiv.channel_log_overlap(p, q, a, b, backend=backend)

    def one(c: int, e: int) -> Tensor:
        weighted = (
            GaussianMixture(p.means, p.variances, a[c], scale_tril=p.scale_tril),
            GaussianMixture(q.means, q.variances, b[..., e, :]),
        )
        return csdiv.log_overlap(*weighted, backend="reference")

    expected = torch.stack([torch.stack([one(c, e) for e in range(channels[1])], -1) for c in range(channels[0])], -2)
    assert found.shape == (2, 5, *channels)
    close(found, expected)
    upstream = torch.randn_like(found)
    close(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_channels_in_chunks_are_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mixture(), mixture(7), *(torch.randn(c, k, dtype=torch.float64) for c, k in ((5, 4), (4, 7)))
    whole = value_and_gradients(*inputs, backend=backend)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16)
    close(value_and_gradients(*inputs, backend=backend), whole)


@pytest.mark.parametrize("backend", ["cpu", emulation.NAME])
def test_channels_go_over_the_pairs_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the value and once more for gradients, also where a batch of weights shares the components."""
    chosen, pairs = backends.resolve(backend, torch.device("cpu")), []
    plain = chosen.forward

    def counted(name: str, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        outputs, grads = plain(name, *arguments)
        assert name == "pairwise"
        pairs.append(outputs[0].numel())
        return outputs, grads

    monkeypatch.setattr(chosen, "forward", counted)
    monkeypatch.setattr(distances, "COSTS", (8, 28, 10_000))
    p, q, a, b = mixture(30, 8), mixture(50, 8), torch.randn(7, 5, 30), torch.randn(4, 50)
    with torch.no_grad():
        csdiv.channel_log_overlap(p, q, a, b, backend=backend)
    assert sum(pairs) == 30 * 50
    value_and_gradients(p, q, a, b, backend=backend)
    assert sum(pairs) == 3 * 30 * 50
    a.requires_grad_()
    csdiv.channel_log_overlap(p, q, a, b, backend=backend).sum().backward()  # of p's weights alone: rows are kept
    assert sum(pairs) == 4 * 30 * 50
    for few in ((p, q, a, b[:1]), (mixture(3, 8), q, a[..., :3], b)):  # one channel, then few pairs
        csdiv.channel_log_overlap(*few, backend=backend)
    assert sum(pairs) == 4 * 30 * 50


@on_every_backend
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("distance", [3.0, 40.0, 1000.0])
def test_channels_of_single_components_far_apart(distance: float, backend: str) -> None:
    """A channel for each component: all pairs, whose logarithms differ by up to 10⁷, with their gradients."""
    means = distance * torch.arange(6, dtype=torch.float64).unsqueeze(-1) + torch.zeros(2)
    p, q = (GaussianMixture(means + torch.rand(6, 2), torch.rand(6, 2, dtype=torch.float64) + 0.5) for _ in range(2))
    one_hot = torch.eye(6, dtype=torch.float64).log()
    found = value_and_gradients(p, q, one_hot, one_hot[:5], backend=backend)
    leaves = [t.detach().clone().requires_grad_() for t in (p.means, p.variances, q.means, q.variances)]
    pairs = csdiv.pairwise_log_overlap(GaussianMixture(*leaves[:2]), GaussianMixture(*leaves[2:]), backend="reference")
    upstream = torch.linspace(-1.0, 2.0, 30, dtype=torch.float64).view(6, 5)
    close(found[0], pairs[:, :5])
    close(found[1:5], list(torch.autograd.grad(pairs[:, :5], leaves, upstream)))
    close(found[5:], [upstream.sum(-1).diag(), torch.eye(5, 6, dtype=torch.float64) * upstream.sum(0).unsqueeze(-1)])


@on_every_backend
@pytest.mark.usefixtures("passes")
def test_channels_without_weight_and_components_without_any(backend: str) -> None:
    """Padding has no gradient and spoils none, whatever stands in it; an empty channel has none either."""
    p, q = mixture(), mixture(7)
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    a[:, 1] = b[:, [2, 5]] = a[2] = b[0] = -math.inf
    expected = value_and_gradients(p, q, a, b, backend="reference")
    assert bool((expected[0][2] == -math.inf).all() & (expected[0][:, 0] == -math.inf).all())
    p.means[1], q.variances[2], q.means[5] = math.nan, -1.0, math.inf
    found = value_and_gradients(p, q, a, b, backend=backend)
    close(found, expected)
    assert not any(bool(t.any()) for t in (found[1][1], found[4][2], found[3][5], found[5][2], found[6][0]))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_channels_stay_within_the_budget(scale: float, backend: str) -> None:
    """Each pair of channels within that of a log overlap, gradients within the sum of theirs."""
    p, q = (mixture(k, 40, dtype=torch.float32) for k in (20, 30))
    p, q = (GaussianMixture(s.means * scale**0.5, s.variances * scale) for s in (p, q))
    a, b = torch.randn(3, 20), torch.randn(2, 30)
    value, *grads = value_and_gradients(p, q, a, b, backend=backend)
    leaves = [t.double().requires_grad_() for t in (p.means, p.variances, q.means, q.variances, a, b)]
    upstream, exact, bands, limits = torch.linspace(-1.0, 2.0, 6).view(3, 2), [], [], [0.0] * 6
    for c, e in itertools.product(range(3), range(2)):
        sides = GaussianMixture(*leaves[:2], leaves[4][c]), GaussianMixture(*leaves[2:4], leaves[5][e])
        exact.append(csdiv.log_overlap(*sides, backend="reference"))
        bands.append(testing.band("log_overlap", *sides))
        own = testing.gradient_bands("log_overlap", *sides, upstream[c, e], leaves)
        limits = [x + y for x, y in zip(limits, own, strict=True)]
    expected = torch.stack(exact).view(3, 2)
    testing.assert_within_budget(value.detach(), expected.detach(), expected.detach(), torch.stack(bands).view(3, 2))
    for g, truth, limit in zip(grads, torch.autograd.grad(expected, leaves, upstream.double()), limits, strict=True):
        testing.assert_within_budget(g, truth, truth, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channels_are_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    p, q = mixture(403, 8, dtype=dtype), mixture(1900, 8, dtype=dtype)
    a, b = torch.randn(7, 403, dtype=dtype), torch.randn(5, 1900, dtype=dtype)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(value_and_gradients(p, q, a, b))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


def test_channels_are_as_exact_whatever_precision_of_products_torch_was_told() -> None:
    sides = mixture(300, 8, dtype=torch.float32), mixture(200, 8, dtype=torch.float32)
    inputs = *sides, torch.randn(5, 300), torch.randn(5, 200)
    expected = value_and_gradients(*inputs)
    torch.set_float32_matmul_precision("medium")
    try:
        found = value_and_gradients(*inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


LARGE = """
import resource, torch, csdiv
from csdiv import testing
torch.set_num_threads(1)
def measure(n):
    p, q = (testing.random_mixture(n, 4).map(lambda t: t.requires_grad_()) for _ in range(2))
    csdiv.channel_log_overlap(p, q, torch.randn(5, n), torch.randn(6, n)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = measure(600)
print(measure(6000) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB is Linux's")
def test_channels_take_memory_for_components_and_a_tile() -> None:
    """The inputs and their gradients, and 24 bytes for each of 2^19 pairs; all pairs would be 137 MiB in float32."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= (32 * 2 * 6000 * (4 + 4 + 6) * 4 + 24 * 2**19) / 1024


def test_channels_with_different_dtypes_are_promoted() -> None:
    p, q = mixture(dtype=torch.float32), mixture(7, dtype=torch.float32)
    a, b = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 7)
    found = csdiv.channel_log_overlap(p, q, a, b)
    assert found.dtype == torch.float64
    wide = p.to(torch.float64), q.to(torch.float64)
    close(found, csdiv.channel_log_overlap(*wide, a, b.double()))
    half = csdiv.channel_log_overlap(p.to(torch.bfloat16), q.to(torch.bfloat16), a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32


@on_every_backend
@pytest.mark.usefixtures("passes")
def test_channel_of_an_undefined_weight_is_nan(backend: str) -> None:
    p, q = mixture(), mixture(7)
    a, b = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    a[0, 1], a[1, 1], b[1] = math.nan, math.inf, -math.inf
    for found in (
        csdiv.channel_log_overlap(p, q, a, b, backend=backend),
        csdiv.channel_log_overlap(q, p, b, a, backend=backend).mT,
    ):
        assert found[:2].isnan().all()
        assert found[2, 0].isfinite()
        assert found[2, 1] == -math.inf
