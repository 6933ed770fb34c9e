"""Networks, the multiplier of the constraint, and the expansion of the prior's self overlap."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import csdiv
from csdiv.models import CSRAE, BernoulliDecoder, ConstraintMultiplier, Encoder, GaussianDecoder
from csdiv.models.multiplier import least_divergence
from csdiv.models.networks import LIKELIHOODS, NOISE_FLOOR, build_networks, standardize_

SHAPES = [("mlp", (7,)), ("mlp", (3, 5, 4))]
SHAPES += [("conv", (c, h, w)) for c, h, w in ((1, 8, 8), (1, 9, 7), (3, 5, 4), (3, 4, 11), (1, 28, 28), (2, 6, 10))]


def gaussian_networks(size: int = 4) -> tuple[Encoder, GaussianDecoder]:
    encoder, decoder = build_networks("mlp", "gaussian", (size,), 2, 8)
    assert isinstance(decoder, GaussianDecoder)
    return encoder, decoder


# networks


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("architecture", "sample_shape"), SHAPES)
def test_build_networks_shapes_and_gradients(architecture: str, sample_shape: tuple[int, ...], likelihood: str) -> None:
    encoder, decoder = build_networks(architecture, likelihood, sample_shape, 3, 8)
    assert type(decoder) is (BernoulliDecoder if likelihood == "bernoulli" else GaussianDecoder)
    size = math.prod(sample_shape)
    for batch in ((5,), (2, 3), (), (0,)):
        x = torch.rand(*batch, size)
        means, log_variances = encoder(x)
        assert means.shape == log_variances.shape == (*batch, 3)
        assert decoder(means).shape == (*batch, size)
        assert decoder.negative_log_likelihood(means, x).shape == batch
    x = torch.rand(5, size).round()
    means, log_variances = encoder(x)
    codes = means + (0.5 * log_variances).exp() * torch.randn_like(means)
    decoder.negative_log_likelihood(codes, x).sum().backward()
    for name, parameter in (*encoder.named_parameters(), *decoder.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("architecture", "sample_shape"), SHAPES)
def test_build_networks_treat_samples_one_by_one(
    architecture: str, sample_shape: tuple[int, ...], likelihood: str
) -> None:
    encoder, decoder = build_networks(architecture, likelihood, sample_shape, 3, 8)
    x, z = torch.rand(2, 3, math.prod(sample_shape)), torch.randn(2, 3, 3)
    for whole, part in zip(encoder(x), encoder(x[1, 2]), strict=True):
        torch.testing.assert_close(whole[1, 2], part)
    torch.testing.assert_close(decoder(z)[1, 2], decoder(z[1, 2]))
    value = decoder.negative_log_likelihood(z, x)[1, 2]
    torch.testing.assert_close(value, decoder.negative_log_likelihood(z[1, 2], x[1, 2]))


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 5, 4)])
def test_build_networks_convolutions_see_every_pixel(shape: tuple[int, ...]) -> None:
    """The encoder depends on each pixel that its strides reach, the decoder gives each pixel a value of its own."""
    encoder, decoder = build_networks("conv", "bernoulli", shape, 2, 8)
    x = torch.rand(8, math.prod(shape), requires_grad=True)
    encoder(x)[0].square().sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().sum(0).view(shape) > 0
    assert seen[:, : shape[1] // 4 * 4, : shape[2] // 4 * 4].all()
    assert (decoder(torch.randn(64, 2)).std(0) > 0).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_negative_log_likelihood_broadcasts_samples(likelihood: str) -> None:
    _, decoder = build_networks("mlp", likelihood, (4,), 2, 8)
    z, x = torch.randn(6, 5, 2), torch.rand(5, 4)
    expected = torch.stack([decoder.negative_log_likelihood(draw, x) for draw in z])
    torch.testing.assert_close(decoder.negative_log_likelihood(z, x), expected)


def test_build_networks_bernoulli_likelihood() -> None:
    _, decoder = build_networks("mlp", "bernoulli", (4,), 2, 8)
    z, x = torch.randn(6, 2), torch.rand(6, 4).round()
    expected = -torch.distributions.Bernoulli(decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(decoder.negative_log_likelihood(z, x), expected)


@pytest.mark.parametrize(
    ("architecture", "likelihood", "sample_shape", "message"),
    [
        ("rnn", "bernoulli", (4,), "architecture: one of 'mlp', 'conv' expected, got 'rnn'"),
        ("mlp", "poisson", (4,), "likelihood: one of 'bernoulli', 'gaussian' expected, got 'poisson'"),
        ("conv", "bernoulli", (64,), r"architecture 'conv': images .* got \(64,\)"),
        ("conv", "gaussian", (1, 3, 8), r"images of 4 x 4 pixels or more expected, got \(1, 3, 8\)"),
        ("conv", "gaussian", (4, 8, 3), r"got \(4, 8, 3\)"),
    ],
)
def test_build_networks_refuses(
    architecture: str, likelihood: str, sample_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_networks(architecture, likelihood, sample_shape, 2, 8)


@pytest.mark.parametrize("log_variance", [0.0, -2.0, math.log(NOISE_FLOOR), -40.0])
def test_gaussian_decoder_is_a_density_in_the_units_of_the_data(log_variance: float) -> None:
    """−log N(x; a + b f(z), b² (σ² + floor)), the floor alone at the last value."""
    encoder, decoder = gaussian_networks()
    encoder, decoder = encoder.double(), decoder.double()
    standardize_(encoder, decoder, torch.randn(50, 4).double() * torch.tensor([0.01, 1.0, 30.0, 2e4]) + 5.0)
    decoder.log_variance.data.fill_(log_variance)
    z = torch.randn(6, 2).double()
    x = decoder(z) + torch.randn(6, 4) * decoder.scale
    torch.testing.assert_close(decoder(z), decoder.shift + decoder.scale * decoder.layers(z))
    deviation = decoder.scale * math.sqrt(math.exp(log_variance) + 1e-4)
    expected = -torch.distributions.Normal(decoder(z), deviation).log_prob(x).sum(-1)
    torch.testing.assert_close(decoder.negative_log_likelihood(z, x), expected, rtol=1e-9, atol=1e-9)


def test_gaussian_decoder_learns_the_variance_of_its_error() -> None:
    """The gradient of log σ² vanishes where σ² + floor is the mean squared error."""
    _, decoder = gaussian_networks()
    z, x = torch.randn(200, 2), torch.randn(200, 4)
    error = (x - decoder(z)).square().mean().item()
    for factor, sign in ((0.5, -1), (1.0, 0), (2.0, 1)):
        decoder.log_variance.data.fill_(math.log(factor * error - NOISE_FLOOR))
        (slope,) = torch.autograd.grad(decoder.negative_log_likelihood(z, x).mean(), decoder.log_variance)
        assert slope.item() == pytest.approx(sign * {-1: 2.0, 0: 0.0, 1: 1.0}[sign], abs=5e-3)


def test_standardize_gives_features_of_mean_zero_and_deviation_one() -> None:
    encoder, decoder = gaussian_networks()
    x = torch.randn(400, 4) * torch.tensor([1e-6, 1.0, 30.0, 1e6]) + torch.tensor([0.0, -3.0, 1e3, 1e6])
    assert standardize_(encoder, decoder, x) == 0
    standard = encoder.layers[0](x)
    torch.testing.assert_close(standard.mean(0), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(4), rtol=1e-4, atol=0)
    torch.testing.assert_close(decoder.shift, x.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(decoder.scale, x.std(0, correction=0), rtol=1e-4, atol=0)


def test_standardize_leaves_constant_features_their_unit() -> None:
    encoder, decoder = gaussian_networks(5)
    x = torch.randn(30, 5)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 0.1, -1e8
    assert standardize_(encoder, decoder, x) == 3
    assert decoder.scale[:3].tolist() == [1.0] * 3
    torch.testing.assert_close(decoder.shift[:3], x[0, :3])
    assert (decoder.scale[3:] - 1).abs().min() > 1e-3
    means, log_variances = encoder(x)
    values = decoder.negative_log_likelihood(means, x)
    assert all(value.isfinite().all() for value in (means, log_variances, values, decoder(means)))
    values.sum().backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters())
    assert standardize_(encoder, decoder, x[:1]) == 5


def test_standardize_changes_no_bernoulli_network() -> None:
    encoder, decoder = build_networks("mlp", "bernoulli", (4,), 2, 8)
    before = [value.clone() for value in (*encoder.state_dict().values(), *decoder.state_dict().values())]
    x = torch.rand(9, 4)
    x[:, 2] = 1.0
    assert standardize_(encoder, decoder, x) == 1
    after = [*encoder.state_dict().values(), *decoder.state_dict().values()]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_gaussian_networks_keep_the_standardization_with_the_weights() -> None:
    encoder, decoder = gaussian_networks()
    x = 3.0 * torch.randn(20, 4) + 7.0
    standardize_(encoder, decoder, x)
    others = gaussian_networks()
    for network, other in zip((encoder, decoder), others, strict=True):
        other.load_state_dict(network.state_dict())
    torch.testing.assert_close(others[0](x)[0], encoder(x)[0])
    torch.testing.assert_close(others[1](others[0](x)[0]), decoder(encoder(x)[0]))


# the multiplier


def test_multiplier_rises_above_the_target_and_falls_below_it() -> None:
    for divergence, expected in ((1.5, math.exp(0.005)), (1.0, 1.0), (0.4, math.exp(-0.006)), (50.0, math.exp(0.01))):
        multiplier = ConstraintMultiplier(2.0, 1.0, rate=0.01)
        weight = multiplier.update_(torch.tensor([divergence - 0.3, divergence + 0.3]))
        assert weight.item() == pytest.approx(2.0 * expected, rel=1e-6)
        assert multiplier.weight.item() == weight.item()
        assert not multiplier.at_cap


def test_multiplier_follows_the_moving_average() -> None:
    multiplier, average = ConstraintMultiplier(1.0, 1.0, rate=0.1), 3.0
    weight = 1.0
    for divergence in (3.0, 0.2, 0.2, 5.0, 0.0):
        average += 0.05 * (divergence - average)
        weight *= math.exp(0.1 * max(-1.0, min(average / 1.0 - 1.0, 1.0)))
        multiplier.update_(torch.full((7,), divergence))
        assert multiplier.average.item() == pytest.approx(average, rel=1e-5)
        assert multiplier.weight.item() == pytest.approx(weight, rel=1e-5)


def test_multiplier_is_capped() -> None:
    multiplier = ConstraintMultiplier(9.9, 0.5, max_weight=10.0)
    for _ in range(5):
        multiplier.update_(torch.tensor([2.0]))
    assert multiplier.weight.item() == 10.0
    assert multiplier.at_cap
    multiplier.average.fill_(0.4)
    assert not multiplier.at_cap
    multiplier.update_(torch.tensor([0.4]))
    assert multiplier.weight.item() < 10.0


def test_multiplier_without_a_target_keeps_its_weight_until_one_is_set() -> None:
    multiplier = ConstraintMultiplier(3.0)
    for divergence in (2.0, 2.0, 2.0):
        assert multiplier.update_(torch.full((4,), divergence)).item() == 3.0
    assert not multiplier.at_cap
    multiplier.set_target_()
    assert multiplier.target.item() == pytest.approx(2.0)
    multiplier.update_(torch.tensor([100.0]))
    assert multiplier.target.item() == pytest.approx(2.0)
    assert multiplier.weight.item() > 3.0


def test_multiplier_solves_a_constrained_problem() -> None:
    """D = c / λ, so that D = ε at λ = c / ε."""
    multiplier = ConstraintMultiplier(2.0, 0.5)
    for _ in range(1500):
        multiplier.update_(6.0 / multiplier.weight)
    assert multiplier.weight.item() == pytest.approx(12.0, rel=0.01)


def test_multiplier_state_dict_round_trip() -> None:
    first, second = ConstraintMultiplier(2.0), ConstraintMultiplier(5.0, 1.0)
    first.update_(torch.tensor([0.7]))
    second.load_state_dict(first.state_dict())
    assert second.target.isnan()
    first.set_target_()
    first.update_(torch.tensor([9.0]))
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert first.update_(torch.tensor([4.0])).item() == second.update_(torch.tensor([4.0])).item() != 2.0
    assert set(first.state_dict()) == {"weight", "target", "average"}


def test_multiplier_keeps_no_graph() -> None:
    multiplier = ConstraintMultiplier(2.0, 1.0)
    multiplier.update_(torch.tensor([3.0], requires_grad=True))
    assert not any(value.requires_grad for value in multiplier.state_dict(keep_vars=True).values())


def far_apart(weights: Tensor) -> tuple[csdiv.GaussianMixture, csdiv.GaussianMixture]:
    """Components 100 deviations apart, and codes that are each one of them, as a batch of mixtures."""
    k = len(weights)
    means = 100.0 * torch.arange(k, dtype=torch.float64).unsqueeze(-1).expand(k, 2)
    variances = torch.tensor([[0.7, 1.3]], dtype=torch.float64).expand(k, 2)
    prior = csdiv.GaussianMixture(means, variances, log_weights=weights.log())
    return prior, csdiv.GaussianMixture(means.unsqueeze(1), variances.unsqueeze(1))


@pytest.mark.parametrize("k", [1, 2, 7])
def test_least_divergence_of_equal_weights(k: int) -> None:
    assert least_divergence(csdiv.GaussianMixture(torch.randn(k, 2), torch.ones(k, 2))) == pytest.approx(
        0.5 * math.log(k), abs=1e-12
    )
    prior, _ = far_apart(torch.full((k,), 3.0, dtype=torch.float64))
    assert least_divergence(prior) == pytest.approx(0.5 * math.log(k), abs=1e-12)


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.5, 0.3, 0.15, 0.05], [0.97, 0.01, 0.02]])
def test_least_divergence_is_the_mean_divergence_of_codes_on_separated_components(weights: list[float]) -> None:
    shares = torch.tensor(weights, dtype=torch.float64)
    prior, codes = far_apart(shares)
    expected = shares @ csdiv.cs_divergence(codes, prior)
    assert least_divergence(prior) == pytest.approx(expected.item(), rel=1e-10)


def test_least_divergence_of_a_component_of_weight_zero() -> None:
    prior, _ = far_apart(torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64))
    assert least_divergence(prior) == pytest.approx(0.5 * math.log(2))


# the expansion of the self overlap


def csrae(interval: int, covariance: str = "diag") -> CSRAE:
    encoder, decoder = build_networks("mlp", "bernoulli", (5,), 2, 8)
    prior = csdiv.nn.GaussianMixturePrior(6, 2, covariance)
    torch.nn.init.normal_(prior.logits)
    return CSRAE(encoder, decoder, prior, self_overlap_interval=interval)


def move(prior: torch.nn.Module, step: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in prior.parameters():
        parameter.data += step * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def counted() -> mock._patch:
    return mock.patch("csdiv.functional.log_overlap", wraps=csdiv.log_overlap)


def test_csrae_computes_the_self_overlap_every_n_calls_in_training() -> None:
    model, x = csrae(3), torch.rand(4, 5).round()
    counts = []
    with counted() as log_overlap:
        for _ in range(8):
            model(x)
            counts.append(log_overlap.call_count)
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_csrae_is_exact_outside_training(context: Callable[[], torch.no_grad]) -> None:
    model = csrae(3)
    model.train(context is torch.no_grad)
    codes = torch.randn(2, 4, 2)
    with context(), counted() as log_overlap:
        for _ in range(4):
            move(model.prior, 0.1)
            torch.testing.assert_close(model.divergence(*codes), csdiv.cs_regularizer(*codes, model.prior))
    assert log_overlap.call_count == 0


def test_csrae_with_interval_one_is_exact_in_training() -> None:
    model, codes = csrae(1), torch.randn(2, 4, 2)
    for _ in range(3):
        move(model.prior, 0.1)
        assert model.divergence(*codes).equal(csdiv.cs_regularizer(*codes, model.prior))


def test_csrae_evaluation_does_not_count_as_a_use_of_the_expansion() -> None:
    model, x = csrae(2), torch.rand(4, 5).round()
    with counted() as log_overlap:
        model(x)
        for _ in range(3):
            model.eval()(x)
        model.train()(x)
        assert log_overlap.call_count == 1
        model(x)
        assert log_overlap.call_count == 2


def test_csrae_between_computations_is_accurate_to_first_order() -> None:
    model, codes = csrae(3), torch.randn(2, 4, 2)
    first = model.divergence(*codes)
    torch.testing.assert_close(first, csdiv.cs_regularizer(*codes, model.prior))
    parameters = list(model.prior.parameters())
    exact_slopes = torch.autograd.grad(csdiv.cs_regularizer(*codes, model.prior).sum(), parameters)
    for slope, exact in zip(torch.autograd.grad(first.sum(), parameters), exact_slopes, strict=True):
        torch.testing.assert_close(slope, exact)
    move(model.prior, 0.02)
    error = (model.divergence(*codes) - csdiv.cs_regularizer(*codes, model.prior)).abs().max()
    assert 1e-6 < error < 1e-3


def test_csrae_refresh_self_overlap() -> None:
    model, codes = csrae(100), torch.randn(2, 4, 2)
    model.divergence(*codes)
    move(model.prior, 1.0)
    exact = csdiv.cs_regularizer(*codes, model.prior)
    assert (model.divergence(*codes) - exact).abs().min() > 0.01
    model.refresh_self_overlap()
    torch.testing.assert_close(model.divergence(*codes), exact)
    with counted() as log_overlap:
        model.divergence(*codes)
    assert log_overlap.call_count == 0


@pytest.mark.parametrize("interval", [0, -1])
def test_csrae_refuses_self_overlap_interval(interval: int) -> None:
    with pytest.raises(ValueError, match=f"self_overlap_interval: at least 1 expected, got {interval}"):
        csrae(interval)
