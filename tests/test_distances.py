"""Distances made from overlaps: ISE, NISE, MMD² and the cosine, against plain formulas and stated bounds."""

import math

import pytest
import torch
from distance_inputs import close, inputs_of, mixture, on_every_backend
from entries import BACKENDS, function
from mixtures import covariances
from test_near_zero import BOUND, near_copies
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing


def overlaps(p: GaussianMixture, q: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """V(p, q), V(p, p), V(q, q) in float64 by the specification."""
    p, q = p.to(torch.float64), q.to(torch.float64)
    return tuple(csdiv.log_overlap(*pair, backend="reference").exp() for pair in ((p, q), (p, p), (q, q)))


# Values


@on_every_backend
@pytest.mark.parametrize("structure", [s for s in testing.STRUCTURES if s != "points"])
def test_distances_are_their_formulas(structure: str, backend: str) -> None:
    backend = "auto" if structure.endswith("full") else backend
    p, q = mixture(structure=structure, batch_shape=(2, 1)), mixture(6, batch_shape=(3,))
    q = GaussianMixture(q.means, q.variances, log_weights=q.log_weights + 0.7)  # unnormalised
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
    u = GaussianMixture(u.means, u.variances, log_weights=u.log_weights + math.log(2.5))
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
    q = GaussianMixture(q.means, q.variances, log_weights=q.log_weights + 0.7)
    leaves = [t.requires_grad_() for t in inputs_of(p, q)]
    value = function(entry, backend)(*leaves)
    grads = torch.autograd.grad(value, leaves)

    wide = [t.detach().double().requires_grad_() for t in leaves]
    added = 0.5 * 0.7**2 if entry == "mmd2" else 0.0
    a, b = (
        GaussianMixture(wide[0], wide[1] + added, log_weights=wide[2]),
        GaussianMixture(wide[3], wide[4] + added, log_weights=wide[5]),
    )
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
        p, q = (GaussianMixture(s.means, variance * s.variances, log_weights=s.log_weights) for s in (p, q))
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
    zero = GaussianMixture(zero.means, zero.variances, log_weights=torch.full_like(zero.log_weights, -math.inf))
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
    q = GaussianMixture(q.means + 1e20, q.variances, log_weights=q.log_weights)
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
