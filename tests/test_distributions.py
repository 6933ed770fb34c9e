"""GaussianMixture from and to torch.distributions."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from mixtures import as_distribution, close, covariances, mixture, on_every_structure
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    Laplace,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import ExpTransform

import csdiv
from csdiv import GaussianMixture


def test_from_distribution_takes_mixtures_and_single_gaussians() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    loc, scale = torch.randn(2, 4, 3, dtype=torch.float64), torch.rand(2, 4, 3, dtype=torch.float64) + 0.5
    factor = mixture("full", batch_shape=(2,)).scale_tril
    logits = torch.randn(2, 4, dtype=torch.float64)
    for components, structure in (
        (Independent(Normal(loc, scale), 1), "diagonal"),
        (MultivariateNormal(loc, scale_tril=factor), "full"),
        (LowRankMultivariateNormal(loc, torch.randn(2, 4, 3, 2, dtype=torch.float64), scale**2), "full"),
    ):
        whole = MixtureSameFamily(Categorical(logits=logits), components)
        p = GaussianMixture.from_distribution(whole)
        assert (p.structure, p.batch_shape, p.num_components) == (structure, (2,), 4)
        close(p.log_prob(x), whole.log_prob(x[:, None]).mT)
        single = GaussianMixture.from_distribution(components)
        assert (single.batch_shape, single.num_components) == ((2, 4), 1)
        close(single.log_prob(x), components.log_prob(x[:, None, None]).movedim(0, -1))


def test_from_distribution_takes_one_normal_variable() -> None:
    p = GaussianMixture.from_distribution(Normal(torch.tensor(0.5), torch.tensor(2.0)))
    assert (p.means.tolist(), p.variances.tolist(), p.log_weights) == ([[0.5]], [[4.0]], None)


def test_functions_take_distributions() -> None:
    p, q = mixture(), mixture("full")
    a, b = as_distribution(p), as_distribution(q)
    for function in (csdiv.cs_divergence, csdiv.ise, csdiv.nise, csdiv.cosine_similarity, csdiv.log_overlap):
        close(function(a, b), function(p, q))
    close(csdiv.mmd2(a, b, 0.7), csdiv.mmd2(p, q, 0.7))
    close(csdiv.renyi2_entropy(a), csdiv.renyi2_entropy(p))


@on_every_structure
def test_to_distribution_is_the_same_density(structure: str) -> None:
    p = mixture(structure, batch_shape=(2,))
    p = p.map(lambda t: t.requires_grad_())
    x = torch.randn(5, 3, dtype=torch.float64)
    whole = p.to_distribution()
    assert (whole.batch_shape, whole.event_shape) == ((2,), (3,))
    close(whole.log_prob(x[:, None]).mT, p.log_prob(x))
    again = GaussianMixture.from_distribution(whole)
    close(csdiv.cs_divergence(again, p), torch.zeros(2, dtype=torch.float64), rtol=0.0, atol=1e-12)
    q = mixture(k=2)
    close(*(torch.autograd.grad(csdiv.cs_divergence(side, q).sum(), p._tensors()) for side in (again, p)))


def test_to_distribution_of_weights_and_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    p = mixture()
    q = GaussianMixture(p.means, covariance_matrix=covariances(p), log_weights=p.log_weights + 3.0)
    x = torch.randn(5, 3, dtype=torch.float64)
    close(q.to_distribution().log_prob(x), p.log_prob(x))  # normalised
    uniform = GaussianMixture(p.means.float(), p.variances)  # promoted
    close(uniform.to_distribution().log_prob(x), uniform.log_prob(x))
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    with pytest.raises(ValueError, match="invalid values"):
        GaussianMixture(p.means, torch.zeros(1, 1)).to_distribution()


def test_from_distribution_passes_gradients_to_the_scale() -> None:
    scale = (torch.rand(4, 3) + 0.5).requires_grad_()
    p = GaussianMixture.from_distribution(Independent(Normal(torch.zeros(4, 3), scale), 1))
    p.log_prob(torch.ones(1, 3)).sum().backward()
    close(scale.grad, 1.0 / scale.detach() ** 3 - 1.0 / scale.detach())


def test_from_distribution_refuses_the_rest() -> None:
    normal = Normal(torch.zeros(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"wrap it in Independent\(..., 1\)"):
        GaussianMixture.from_distribution(normal)
    laplace = Independent(Laplace(torch.zeros(4, 3), torch.ones(4, 3)), 1)
    blocks = Independent(MultivariateNormal(torch.zeros(4, 3), torch.eye(3)), 1)
    for other in (laplace, blocks, TransformedDistribution(normal, ExpTransform()), Categorical(torch.ones(3))):
        with pytest.raises((TypeError, ValueError), match="expected, got"):
            GaussianMixture.from_distribution(other)


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("light", [1e-20, 1e-7, 0.0])
@pytest.mark.parametrize("form", ["probs", "after logits were read", "after log_prob", "expanded", "logits"])
def test_from_distribution_reads_weights_as_they_were_given(form: str, light: float, dtype: torch.dtype) -> None:
    """torch derives logits from probabilities clamped at eps; log p is that of the light component alone."""
    probs = torch.tensor([1.0, light], dtype=dtype)
    weights = Categorical(logits=probs.log()) if form == "logits" else Categorical(probs=probs)
    whole = MixtureSameFamily(weights, Normal(torch.tensor([0.0, 60.0], dtype=dtype), torch.ones(2, dtype=dtype)))
    at = torch.tensor([60.0], dtype=dtype)
    if form == "after logits were read":
        assert weights.logits[1] >= -37.0
    if form == "after log_prob":
        whole.log_prob(at)
    if form == "expanded":
        whole = whole.expand((3,))
    log_density = torch.tensor([-0.5 * 60.0**2, math.log(light) if light else -math.inf], dtype=torch.float64)
    expected = (log_density.logsumexp(0) - 0.5 * math.log(2.0 * math.pi)).to(dtype)
    found = GaussianMixture.from_distribution(whole).log_prob(at.view(1, 1))
    close(found, expected.expand(found.shape), rtol=2e-7, atol=0.0)


def test_from_distribution_passes_gradients_to_probabilities() -> None:
    """∂ log p / ∂ w_k = N_k / p − 1 for weights that are normalised: also where w_k is 0."""
    w = torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64, requires_grad=True)
    loc = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    x = torch.tensor([[0.5]], dtype=torch.float64)
    p = GaussianMixture.from_distribution(MixtureSameFamily(Categorical(probs=w), Normal(loc, 1.0)))
    densities = Normal(loc, 1.0).log_prob(x[0]).exp()
    (found,) = torch.autograd.grad(p.log_prob(x).sum(), w)
    close(found, densities / (densities @ w.detach()) - 1.0)


def test_from_distribution_log_overlap_of_light_weights() -> None:
    """log V(p, N(60, 1)) with the weights w at 60 and 1 at 0: log w − log 4π/2, or −60²/4 − log 4π/2."""
    q = GaussianMixture(torch.tensor([[60.0]]), torch.ones(1, 1))
    for w, expected in ((1e-20, math.log(1e-20)), (0.0, -900.0)):
        weights = Categorical(torch.tensor([1.0, w]))
        p = MixtureSameFamily(weights, Normal(torch.tensor([0.0, 60.0]), torch.ones(2)))
        close(
            csdiv.log_overlap(p, q).double(),
            torch.tensor(expected - 0.5 * math.log(4.0 * math.pi)).double(),
            rtol=1e-6,
            atol=0.0,
        )


def test_from_distribution_of_many_equal_weights() -> None:
    """The smallest that torch has is 2⁻²³."""
    k = 2**24
    p = GaussianMixture.from_distribution(MixtureSameFamily(Categorical(torch.ones(k)), Normal(torch.zeros(k), 1.0)))
    assert p.structure == "tied diagonal"
    close(p.log_weights[:3], torch.full((3,), -24.0 * math.log(2.0)), rtol=1e-7, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_distribution_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    """Squares of scales leave float16; gradients return in it."""
    for value in (1e-4, 300.0):
        scale = torch.full((2, 3), value, dtype=dtype, requires_grad=True)
        logits = torch.zeros(2, dtype=dtype)
        whole = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(torch.zeros_like(scale), scale), 1))
        x = torch.zeros(1, 3, dtype=dtype)
        found = GaussianMixture.from_distribution(whole).log_prob(x)
        expected = -3.0 * (scale.detach().double()[0, 0].log() + 0.5 * math.log(2.0 * math.pi))
        close(found, expected.float().view(1), rtol=1e-6, atol=0.0)
        (grad,) = torch.autograd.grad(found.sum() * value, scale)
        assert grad.dtype == dtype
        close(grad.float(), torch.full((2, 3), -0.5), rtol=1e-2, atol=0.0)
        again = GaussianMixture.from_distribution(whole).to_distribution()
        close(again.component_distribution.base_dist.scale, scale.detach().float())


# Shapes


@pytest.mark.parametrize(
    ("component", "event"),
    [
        (lambda loc, scale: Normal(loc, scale), ()),
        (lambda loc, scale: Independent(Normal(loc, scale), 0), ()),
        (lambda loc, scale: Independent(Normal(loc, scale), 1), (3,)),
        (lambda loc, scale: Independent(Normal(loc, scale), 2), (3, 2)),
        (lambda loc, scale: Independent(Independent(Normal(loc, scale), 1), 2), (3, 1, 2)),
        (lambda loc, scale: Independent(MultivariateNormal(loc, scale.square().diag_embed()), 0), (3,)),
    ],
)
@pytest.mark.parametrize("batch", [(), (5,)])
def test_from_distribution_of_any_event_dimensions(
    component: Callable[..., Distribution], event: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    """Flattened to D, none to D = 1: a mixture density network has Normal components."""
    loc = torch.randn(*batch, 4, *event, dtype=torch.float64)
    scale = (torch.rand_like(loc) + 0.5).requires_grad_()
    whole = MixtureSameFamily(Categorical(logits=torch.randn(*batch, 4, dtype=torch.float64)), component(loc, scale))
    p = GaussianMixture.from_distribution(whole)
    x = torch.randn(7, *[1] * len(batch), *event, dtype=torch.float64)
    found = p.log_prob(x.reshape(7, -1))
    close(found, whole.log_prob(x).movedim(0, -1))
    grads = [torch.autograd.grad(value.sum(), scale, retain_graph=True)[0] for value in (found, whole.log_prob(x))]
    close(*grads)
    if event or type(whole.component_distribution) is Independent:
        single = GaussianMixture.from_distribution(whole.component_distribution)
        assert (single.batch_shape, single.num_components) == ((*batch, 4), 1)
        x = x.unsqueeze(1 + len(batch))
        close(single.log_prob(x.reshape(7, -1)), whole.component_distribution.log_prob(x).movedim(0, -1))


@pytest.mark.parametrize(
    ("component", "shape"),
    [
        (lambda loc, s: Independent(Normal(loc, s), 1), (1, 1)),
        (lambda loc, s: Independent(Normal(loc, s * torch.ones(3)), 1), (1, 3)),
        (lambda loc, s: Independent(Normal(loc, s * torch.ones(4, 1)), 1), (4, 1)),
        (lambda loc, s: Independent(Normal(loc, s * torch.ones(5, 1, 1)), 1), (5, 1, 1)),
        (lambda loc, s: Independent(Normal(loc, s * torch.ones(4, 3)), 1), (4, 3)),
        (lambda loc, s: Normal(loc[..., 0], s), (1, 1)),
        (lambda loc, s: Independent(Normal(loc.unsqueeze(-1).expand(5, 4, 3, 2), s * torch.ones(3, 1)), 2), (1, 6)),
        (lambda loc, s: MultivariateNormal(loc, s * torch.eye(3)), (1, 3, 3)),
        (lambda loc, s: MultivariateNormal(loc, scale_tril=s * torch.eye(3)), (1, 3, 3)),
        (lambda loc, s: MultivariateNormal(loc, precision_matrix=s * torch.eye(3)), (1, 3, 3)),
        (lambda loc, s: MultivariateNormal(loc, (s * torch.eye(3)).expand(5, 1, 3, 3)), (1, 3, 3)),
        (lambda loc, s: MultivariateNormal(loc, s * torch.eye(3).repeat(5, 1, 1, 1)), (5, 1, 3, 3)),
        (lambda loc, s: LowRankMultivariateNormal(loc, torch.ones(3, 1), s * torch.ones(3)), (1, 3, 3)),
        (lambda loc, s: LowRankMultivariateNormal(loc, torch.ones(3, 1), s * torch.ones(4, 3)), (4, 3, 3)),
    ],
)
def test_from_distribution_shares_what_is_expanded(
    component: Callable[..., Distribution], shape: tuple[int, ...]
) -> None:
    """In a mixture; and in a batch of Gaussians, whose last dimension is a batch dimension then."""
    torch.set_default_dtype(torch.float64)
    try:
        s = torch.tensor(0.7, requires_grad=True)
        components = component(torch.randn(5, 4, 3), s)
        whole = MixtureSameFamily(Categorical(logits=torch.randn(5, 4)), components)
    finally:
        torch.set_default_dtype(torch.float32)
    p = GaussianMixture.from_distribution(whole)
    (spread,) = (t for name in ("variances", "scale_tril", "covariance_matrix") if (t := getattr(p, name)) is not None)
    assert tuple(spread.shape) == shape
    assert p.batch_shape == (5,)
    x = torch.randn(6, 1, *components.event_shape, dtype=torch.float64)
    values = p.log_prob(x.reshape(6, -1)), whole.log_prob(x).movedim(0, -1)
    close(*values)
    close(*(torch.autograd.grad(value.sum(), s, retain_graph=True)[0] for value in values))
    if components.event_shape:
        single = GaussianMixture.from_distribution(components)
        x = x.unsqueeze(1)
        close(single.log_prob(x.reshape(6, -1)), components.log_prob(x).movedim(0, -1))


def test_from_distribution_of_one_covariance_is_tied() -> None:
    batch = MultivariateNormal(torch.randn(6, 3), torch.eye(3))
    p = GaussianMixture.from_distribution(batch)
    assert (tuple(p.means.shape), tuple(p.covariance_matrix.shape)) == ((6, 1, 3), (1, 3, 3))
    assert csdiv.pairs.route(p, p, "auto").formula == csdiv.pairs.WHITENED


# Covariances


@pytest.mark.parametrize(("diagonal", "expected"), [(1e-5, 15.80597), (1e-7, 25.0163)])
def test_from_distribution_of_low_rank_loses_no_digits(diagonal: float, expected: float) -> None:
    """At the mean, and at samples as far as rounding a factor's entries to float32 goes: the product loses them all."""
    torch.manual_seed(0)
    d = LowRankMultivariateNormal(torch.zeros(6), torch.randn(6, 2), torch.full((6,), diagonal))
    p = GaussianMixture.from_distribution(d)
    assert (p.dtype, p.structure) == (torch.float32, "full")
    assert abs(p.log_prob(torch.zeros(1, 6)).item() - expected) < 1e-5 + 1e-4 * (diagonal < 1e-6)
    x, factor = d.sample((100,)), d.cov_factor.double()
    exact = MultivariateNormal(d.loc.double(), factor @ factor.mT + d.cov_diag.double().diag_embed())
    z = 1.0 / d.cov_diag.double().sqrt()[0]
    bound = 6 * 2.0**-24 * z * factor.abs().max() * 25.0
    assert (p.log_prob(x) - exact.log_prob(x.double())).abs().max() <= bound
    whole = MixtureSameFamily(Categorical(torch.ones(1)), copy.deepcopy(d).expand((1,)))
    close(csdiv.log_overlap(whole), csdiv.log_overlap(p))


def test_from_distribution_of_low_rank_has_gradients() -> None:
    def value(loc: torch.Tensor, factor: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
        p = GaussianMixture.from_distribution(LowRankMultivariateNormal(loc, factor, diagonal))
        return p.log_prob(torch.ones(1, 3, dtype=torch.float64))

    inputs = (torch.randn(2, 3), torch.randn(2, 3, 2), torch.rand(3) + 0.1)
    assert torch.autograd.gradcheck(value, [t.double().requires_grad_() for t in inputs])


def test_from_distribution_reads_the_covariance_that_was_given() -> None:
    """torch's Cholesky factor in float32 has lost the digits that a needle is made of."""
    direction = torch.tensor([1.0, 1.0], dtype=torch.float64) / math.sqrt(2.0)
    covariance = torch.outer(direction, direction) + 1e-5 * torch.eye(2, dtype=torch.float64)
    d = MultivariateNormal(torch.zeros(2), covariance.float())
    found = GaussianMixture.from_distribution(d).log_prob(torch.zeros(1, 2))
    exact = -0.5 * (2.0 * math.pi * covariance.float().double()).logdet()
    close(found, exact.float().view(1), rtol=2e-7, atol=0.0)
    _ = d.scale_tril  # torch keeps it beside the covariance
    close(GaussianMixture.from_distribution(d).log_prob(torch.zeros(1, 2)), exact.float().view(1), rtol=1e-2, atol=0.0)
