"""Draws from mixtures."""

import math

import numpy as np
import pytest
import torch
from mixtures import close, covariances, mixture, on_every_structure

from csdiv import GaussianMixture


@on_every_structure
def test_sample_has_the_moments(structure: str) -> None:
    p = mixture(structure, spread=3.0)
    n = 40000
    x = p.sample(n)
    assert x.shape == (n, 3)
    assert not x.requires_grad
    w = p.log_weights.exp()
    mean = w @ p.means
    spread = torch.einsum("k,kij->ij", w, covariances(p) + p.means[:, :, None] * p.means[:, None]) - mean.outer(mean)
    sigma = spread.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() <= 5.0 * sigma / math.sqrt(n)).all()  # 5 standard errors
    centred = x - mean
    error = centred.mT @ centred / n - spread
    # The standard error of a second moment, from the sample's fourth.
    fourth = (centred[:, :, None] * centred[:, None]).std(0) / math.sqrt(n)
    assert (error.abs() <= 5.0 * fourth).all()


def test_sample_shapes_of_batches_and_weights() -> None:
    assert mixture(batch_shape=(2, 3)).sample(5).shape == (2, 3, 5, 3)
    assert GaussianMixture(torch.zeros(4, 3), torch.ones(1, 1)).sample(0).shape == (0, 3)
    lone = torch.tensor([-math.inf, 5.0, -math.inf])
    p = GaussianMixture(torch.tensor([[0.0], [10.0], [20.0]]), torch.full((1, 1), 1e-6), log_weights=lone)
    close(p.sample(100), torch.full((100, 1), 10.0), atol=0.1, rtol=0.0)


@on_every_structure
def test_rsample_has_gradients_to_means_and_covariances(structure: str) -> None:
    p = mixture(structure).map(lambda t: t.requires_grad_())
    covariance = p.variances if p.variances is not None else p.scale_tril
    x = p.rsample(1000)
    x.sum().backward()
    close(p.means.grad.sum(0), torch.full((3,), 1000.0, dtype=torch.float64))  # ∂x/∂μ = 1 for the drawn component
    assert p.log_weights.grad is None
    # x = μ + √s ε, so Σ 2s ∂x/∂s, or Σ R ∂x/∂R, is Σ (x − μ) of the drawn components.
    factor = 2.0 if p.variances is not None else 1.0
    displaced = (factor * covariance.grad * covariance.detach()).sum()
    drawn = (p.means.grad[:, :1] * p.means.detach()).sum()
    close(displaced, x.detach().sum() - drawn)


def test_rsample_with_a_covariance_matrix() -> None:
    p = mixture("full")
    q = GaussianMixture(p.means, covariance_matrix=covariances(p).requires_grad_(), log_weights=p.log_weights)
    torch.manual_seed(1)
    expected = p.rsample(10)
    torch.manual_seed(1)
    found = q.rsample(10)
    close(found, expected)
    found.sum().backward()
    assert q.covariance_matrix.grad.abs().sum() > 0.0


def drawn_components(log_weights: torch.Tensor, n: int) -> torch.Tensor:
    """Indices of the components of n draws: component k is the point k."""
    points = torch.arange(log_weights.shape[-1], dtype=torch.float64).unsqueeze(-1)
    return GaussianMixture(points, torch.zeros(1, 1), log_weights=log_weights).sample(n).squeeze(-1).long()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sample_draws_components_by_their_weights(dtype: torch.dtype) -> None:
    """Also of a batch of weights; five standard errors."""
    weights = torch.tensor([[0.5, 0.0, 0.125, 0.375], [0.0, 0.0, 1.0, 0.0]])
    n = 40000
    index = drawn_components(3.0 + weights.log().to(dtype), n)
    for item, expected in zip(index, weights, strict=True):
        share = item.bincount(minlength=4) / n
        assert (
            (share - expected).abs() <= 5.0 * (expected * (1.0 - expected) / n).sqrt() + 1e-3 * (dtype.itemsize < 4)
        ).all()
        assert (share[expected == 0.0] == 0.0).all()


@pytest.mark.parametrize("k", [2**23, 2**24 + 2])
def test_sample_of_millions_of_components_keeps_their_shares(k: int) -> None:
    log_weights = torch.tensor([math.log(2.0), 0.0]).repeat(k // 2)
    n = 40000
    index = drawn_components(log_weights, n)
    expected = 5.0 * math.sqrt(2.0 / 9.0 / n)
    assert abs((index % 2).double().mean() - 1.0 / 3.0) <= expected
    assert abs(index.double().mean() / k - 0.5) <= 5.0 * math.sqrt(1.0 / 12.0 / n)


def test_sample_of_a_million_light_components_beside_a_heavy_one() -> None:
    log_weights = torch.full((10**6 + 1,), math.log(1e-8))
    log_weights[0] = math.log(0.99)
    share = (drawn_components(log_weights, 40000) > 0).double().mean()
    assert abs(share - 0.01) <= 5.0 * math.sqrt(0.01 * 0.99 / 40000)


def test_sample_of_weights_is_the_same_for_the_same_seed() -> None:
    p = mixture(k=1000)
    draws = [(torch.manual_seed(3), p.sample(100))[1] for _ in range(2)]
    assert torch.equal(*draws)


@on_every_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sample_of_half_precision_and_of_mixed_dtypes(structure: str, dtype: torch.dtype) -> None:
    p = mixture(structure, batch_shape=(2,))
    half = p.map(lambda t: t.to(dtype))
    mixed = GaussianMixture(half.means, p.variances, log_weights=half.log_weights.float(), scale_tril=p.scale_tril)
    for given, wide in ((half, torch.float32), (mixed, torch.float64)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            found = given.sample(50)
        torch.manual_seed(0)
        assert torch.equal(found, given.to(wide).sample(50))
        assert (found.dtype, found.shape) == (wide, (2, 50, 3))


@on_every_structure
def test_sample_takes_no_draws_and_any_integer(structure: str) -> None:
    p = mixture(structure)
    assert p.sample(0).shape == (0, 3)
    assert p.sample(np.int64(2)).shape == p.sample(torch.tensor(2)).shape == (2, 3)
    for wrong in ((4,), 2.0, "4", None, torch.Size([4])):
        with pytest.raises(TypeError, match="n: a number of draws expected, got"):
            p.sample(wrong)
    with pytest.raises(ValueError, match="n: a number of draws >= 0 expected, got -1"):
        p.sample(-1)


def test_sample_without_any_weight_is_nan() -> None:
    weights = torch.tensor([[-math.inf, -math.inf], [math.inf, 0.0], [math.nan, 0.0], [0.0, -math.inf]])
    x = GaussianMixture(torch.zeros(2, 1), torch.ones(1, 1), log_weights=weights).sample(3)
    assert x.isnan().flatten(1).all(1).tolist() == [True, True, True, False]
    assert x[3].isfinite().all()


def test_rsample_gives_no_gradient_to_what_was_not_drawn() -> None:
    variances = torch.tensor([[1.0, 1.0], [0.0, math.nan]], requires_grad=True)
    means = torch.zeros(2, 2, requires_grad=True)
    x = GaussianMixture(means, variances, log_weights=torch.tensor([0.0, -math.inf])).rsample(5)
    x.sum().backward()
    assert x.isfinite().all()
    assert (means.grad[1] == 0.0).all()
    assert (variances.grad[1] == 0.0).all()
    assert variances.grad[0].isfinite().all()


@pytest.mark.parametrize("k", [1, 4])
def test_sample_of_a_square_factor(k: int) -> None:
    """Rotations times scales; the draws are R times what the identity draws."""
    factor = torch.randn(k, 3, 3, dtype=torch.float64, requires_grad=True)
    means = torch.zeros(4, 3, dtype=torch.float64)
    p, identity = GaussianMixture(means, factor=factor), GaussianMixture(means, scale_tril=torch.eye(3).double()[None])
    torch.manual_seed(0)
    x = p.rsample(200)
    torch.manual_seed(0)
    index, noise = torch.randint(4, (200,)), torch.randn(200, 3, dtype=torch.float64)
    expected = (factor.detach()[index % k] @ noise.unsqueeze(-1)).squeeze(-1)
    close(x.detach(), expected)
    torch.manual_seed(0)
    close(identity.sample(200), noise)
    assert torch.autograd.grad(x.sum(), factor)[0].abs().min() > 0.0


def test_sample_reads_the_lower_triangle_of_a_factor() -> None:
    factor = torch.tensor([[[2.0, 7.0], [1.0, 1.0]]], requires_grad=True)
    p = GaussianMixture(torch.zeros(1, 2), scale_tril=factor)
    torch.manual_seed(0)
    x = p.rsample(10)
    torch.manual_seed(0)
    expected = GaussianMixture(torch.zeros(1, 2), scale_tril=factor.detach().tril()).sample(10)
    close(x.detach(), expected)
    x.square().sum().backward()
    assert factor.grad[0, 0, 1] == 0.0
    assert (factor.grad.tril() != 0.0).sum() == 3
