"""Full covariances given by factors, ill-conditioned ones, and tied ones with what must not move their result."""

import math

import pytest
import torch
from entries import WITH_FULL
from mpmath import mp, mpf
from torch import Tensor
from torch.distributions import MultivariateNormal

import csdiv
from csdiv import GaussianMixture, testing

F64 = torch.float64
NARROW = [
    # ε, log V(p, p) and log p(0) of N(0, L Lᵀ) with L = [[1, 0], [1, ε]]
    (1e-6, torch.float32, 11.28449, 11.97763),
    (1e-7, torch.float32, 13.58707, 14.28022),
    (1e-8, torch.float32, 15.88966, 16.58280),
    (1e-9, F64, 18.19224, 18.88539),
]


def narrow(epsilon: float, dtype: torch.dtype, form: str) -> GaussianMixture:
    """As a Cholesky factor, or as that factor times a rotation."""
    lower = torch.tensor([[[1.0, 0.0], [1.0, epsilon]]], dtype=dtype)
    if form == "factor":
        return GaussianMixture(torch.zeros(1, 2, dtype=dtype), factor=lower.flip(-1))
    return GaussianMixture(torch.zeros(1, 2, dtype=dtype), scale_tril=lower)


@pytest.mark.parametrize("form", ["scale_tril", "factor"])
@pytest.mark.parametrize(("epsilon", "dtype", "own", "at_mean"), NARROW)
@pytest.mark.parametrize("backend", [*WITH_FULL, "auto"])
def test_a_factor_is_not_squared(
    epsilon: float, dtype: torch.dtype, own: float, at_mean: float, form: str, backend: str
) -> None:
    p = narrow(epsilon, dtype, form)
    tied = GaussianMixture(p.means.expand(3, 2), **{form: getattr(p, form)})
    many = GaussianMixture(p.means.expand(3, 2), **{form: getattr(p, form).repeat(3, 1, 1)})
    origin = torch.zeros(2, 2, dtype=dtype)
    for mixture in (p, tied):
        assert csdiv.log_overlap(mixture, backend=backend).item() == pytest.approx(own, abs=6e-6)
    for mixture in (p, tied, many) if backend in ("auto", "cpu", "reference") else (p, tied):
        assert mixture.log_prob(origin, backend=backend)[0].item() == pytest.approx(at_mean, abs=6e-6)
        assert mixture.responsibilities(origin, backend=backend).sum().item() == pytest.approx(2.0)
    other = csdiv.GaussianMixture(p.means.clone(), **{form: getattr(p, form).clone()})
    assert csdiv.log_overlap(p, other, backend=backend).item() == pytest.approx(own, abs=6e-6)


@pytest.mark.parametrize("structure", ["full", "tied full"])
@pytest.mark.parametrize("dim", [1, 2, 5, 9, 32, 35])
def test_factors_have_the_values_and_gradients_of_their_products(dim: int, structure: str) -> None:
    """Of log densities, against plain torch on the product, in float64."""
    g = torch.Generator().manual_seed(dim)
    k = 1 if structure == "tied full" else 11
    means, x = (torch.randn(n, dim, generator=g, dtype=F64).requires_grad_() for n in (11, 7))
    factor = (0.3 * torch.randn(k, dim, dim, generator=g, dtype=F64) / dim + torch.eye(dim, dtype=F64)).requires_grad_()
    log_weights = torch.randn(11, generator=g, dtype=F64).requires_grad_()
    upstream = torch.randn(7, generator=g, dtype=F64)
    for form in ("scale_tril", "factor"):
        lower = factor.tril() if form == "scale_tril" else factor
        components = MultivariateNormal(means, lower @ lower.mT)
        expected = (components.log_prob(x.unsqueeze(-2)) + log_weights).logsumexp(-1)
        p = GaussianMixture(means, log_weights=log_weights, **{form: factor})
        found = p.log_prob(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        leaves = [means, x, factor, log_weights]
        grads, expected_grads = (torch.autograd.grad(v @ upstream, leaves) for v in (found, expected))
        torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(
            p.responsibilities(x), (components.log_prob(x.unsqueeze(-2)) + log_weights).softmax(-1)
        )
        assert torch.equal(p.assign(x), (components.log_prob(x.unsqueeze(-2)) + log_weights).argmax(-1))


@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "component_log_overlap", "rsample"])
@pytest.mark.parametrize("structure", ["full", "tied full"])
def test_gradients_to_scale_tril_stay_in_its_lower_triangle(structure: str, entry: str) -> None:
    """So that a step of gradient descent leaves a factor a factor; what is above the diagonal is not read."""
    p, q = (testing.random_mixture(k, 3, structure=structure, dtype=F64) for k in (4, 5))
    assert p.scale_tril is not None
    leaf = (p.scale_tril + torch.ones(3, 3, dtype=F64).triu(1)).requires_grad_()
    made = GaussianMixture(p.means, scale_tril=leaf, log_weights=p.log_weights)
    value = made.rsample(5) if entry == "rsample" else getattr(csdiv, entry)(made, q)
    if entry != "rsample":
        assert torch.equal(value, getattr(csdiv, entry)(p, q))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert not grad.triu(1).any()
    assert grad.tril().abs().sum() > 0.0
    GaussianMixture(p.means, scale_tril=leaf.detach() - 1e-3 * grad)


@pytest.mark.parametrize("dim", [33, 64])
@pytest.mark.parametrize("structure", ["full", "tied full"])
def test_many_dimensions_and_a_large_condition(dim: int, structure: str) -> None:
    """float32 parameters of condition 1e7, against triangular solves with 40 digits."""
    g = torch.Generator().manual_seed(dim)
    rows = 2 if structure == "full" else 1
    rotation = torch.linalg.qr(torch.randn(rows, dim, dim, generator=g, dtype=F64)).Q
    scales = torch.logspace(0.0, -3.5, dim, dtype=F64)
    lower = torch.linalg.cholesky((rotation * scales) @ (rotation * scales).mT).float()
    means = torch.randn(2, dim, generator=g)
    x = (means[0].double() + lower[0].double() @ torch.randn(dim, generator=g, dtype=F64)).float()
    terms = []
    with mp.workdps(40):
        for k in range(2):
            solved: list[mpf] = []
            row = lower[k % rows].tolist()
            for i in range(dim):
                rest = mpf(x[i].item()) - mpf(means[k, i].item()) - sum(row[i][j] * solved[j] for j in range(i))
                solved.append(rest / row[i][i])
            log_det = sum(mp.log(row[i][i]) for i in range(dim))
            terms.append(-sum(z * z for z in solved) / 2 - log_det - dim * mp.log(2 * mp.pi) / 2 - mp.log(2))
        expected = float(mp.log(sum(mp.exp(t) for t in terms)))
    for form in ("scale_tril", "factor"):
        p = GaussianMixture(means, **{form: lower})
        for backend in ("auto", "reference"):
            assert p.log_prob(x.unsqueeze(0), backend=backend).item() == pytest.approx(expected, rel=2e-7)


def off_centre(kind: str) -> tuple[GaussianMixture, GaussianMixture]:
    """A tied mixture near the origin, and the same with something that must not move its result."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, generator=g, dtype=F64)
    factor = torch.tensor([[[1.0, 0.0], [0.3, 0.8]]], dtype=F64)
    weights = torch.full((5,), 0.2, dtype=F64).log()
    plain = GaussianMixture(means, scale_tril=factor, log_weights=weights)
    if kind == "batch":
        other = means + 1e12
        return plain, GaussianMixture(torch.stack([means, other]), scale_tril=factor, log_weights=weights)
    far, log_weight = {"absent": (1e20, -math.inf), "light": (1e14, -700.0)}[kind]
    means = torch.cat([means, torch.full((1, 2), far, dtype=F64)])
    weights = torch.cat([weights, torch.tensor([log_weight], dtype=F64)])
    return plain, GaussianMixture(means, scale_tril=factor, log_weights=weights)


@pytest.mark.parametrize("kind", ["absent", "light", "batch"])
@pytest.mark.parametrize("form", ["scale_tril", "covariance_matrix"])
@pytest.mark.parametrize("backend", [*WITH_FULL, "auto"])
def test_tied_mixtures_do_not_feel_what_counts_nothing(backend: str, form: str, kind: str) -> None:
    plain, spoilt = off_centre(kind)
    if form == "covariance_matrix":
        plain, spoilt = (
            GaussianMixture(p.means, covariance_matrix=p.scale_tril @ p.scale_tril.mT, log_weights=p.log_weights)
            for p in (plain, spoilt)
        )
    first = (lambda t: t[0]) if kind == "batch" else (lambda t: t)
    x = plain.means
    close = torch.testing.assert_close
    assert first(csdiv.cs_divergence(spoilt, plain, backend=backend)).abs() < 1e-14
    close(first(spoilt.log_prob(x, backend=backend)), plain.log_prob(x, backend=backend), rtol=0, atol=1e-14)
    close(
        first(csdiv.log_overlap(spoilt, backend=backend)), csdiv.log_overlap(plain, backend=backend), rtol=0, atol=1e-14
    )
    assert torch.equal(first(spoilt.assign(x, backend=backend)), torch.arange(5))


def test_permuting_a_batch_of_tied_mixtures_permutes_the_bits() -> None:
    means = torch.randn(4, 6, 3, dtype=F64) * torch.tensor([1.0, 10.0, 1e3, 1e12], dtype=F64)[:, None, None]
    p = GaussianMixture(means, covariance_matrix=torch.eye(3, dtype=F64)[None])
    q = GaussianMixture(means.flip(0), covariance_matrix=torch.eye(3, dtype=F64)[None])
    x = testing.random_mixture(2, 3, structure="tied full", dtype=F64)
    for function in (
        csdiv.log_overlap,
        lambda side: csdiv.cs_divergence(side, x),
        lambda side: side.log_prob(means[0]),
    ):
        assert torch.equal(function(p), function(q).flip(0))


def test_tied_components_far_apart_take_the_direct_path() -> None:
    """1e9 standard deviations from each other, with differences that are exact."""
    means = torch.tensor([[0.0, 0.0], [0.25, 0.5], [1e9, 0.0], [1e9 + 0.25, 0.5]], dtype=F64)
    tied, many = (GaussianMixture(means, scale_tril=torch.eye(2, dtype=F64).expand(k, 2, 2).clone()) for k in (1, 4))
    expected = csdiv.pairwise_log_overlap(
        GaussianMixture(means, torch.ones(1, 1, dtype=F64)), tied, backend="reference"
    )
    torch.testing.assert_close(csdiv.pairwise_log_overlap(tied, tied), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(csdiv.log_overlap(tied), csdiv.log_overlap(many), rtol=1e-14, atol=0)
    torch.testing.assert_close(tied.log_prob(means), many.log_prob(means), rtol=1e-14, atol=0)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_factor_forms_have_second_derivatives_and_vmap(batch: tuple[int, ...]) -> None:
    p = testing.random_mixture(3, 2, batch_shape=batch, structure="full", dtype=F64)
    x = torch.randn(*batch, 4, 2, dtype=F64)

    def density(means: Tensor, factor: Tensor, x: Tensor) -> Tensor:
        return GaussianMixture(means, scale_tril=factor).log_prob(x)

    inputs = [t.requires_grad_() for t in (p.means, p.scale_tril, x)]
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)
    if batch:
        torch.testing.assert_close(torch.vmap(density)(*inputs), density(*inputs))
        grads = torch.vmap(torch.func.grad(lambda *t: density(*t).sum(), (0, 1)))(*inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(density(*inputs).sum(), inputs[:2]))
