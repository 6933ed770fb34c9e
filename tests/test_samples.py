"""Kernel density estimates from samples."""

import math

import numpy as np
import pytest
import torch
from mixtures import close
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity

import csdiv
from csdiv import GaussianMixture


def test_from_samples_is_the_kernel_density_estimate() -> None:
    x, y = torch.randn(200, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    weights = torch.rand(200, dtype=torch.float64)
    for given in (None, weights):
        estimate = KernelDensity(bandwidth=0.3).fit(x.numpy(), sample_weight=given)
        for h in (0.3, torch.tensor(0.3, dtype=torch.float64)):
            p = GaussianMixture.from_samples(x, h, weights=given)
            assert p.structure == "tied spherical"
            close(p.log_prob(y), torch.from_numpy(estimate.score_samples(y.numpy())))
    per_sample = GaussianMixture.from_samples(x, 0.1 + torch.rand(200, 1))
    assert (per_sample.structure, per_sample.num_components) == ("spherical", 200)
    assert GaussianMixture.from_samples(x.view(2, 100, 3), 0.3).batch_shape == (2,)


def test_from_samples_of_weight_zero_and_gradients() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    bandwidth = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    p = GaussianMixture.from_samples(x, bandwidth, weights=weights)
    assert p.log_weights[1] == -math.inf
    grads = torch.autograd.grad(csdiv.log_overlap(p), [x, weights, bandwidth])
    assert all(bool(g.isfinite().all()) for g in grads)
    assert grads[1].abs().min() > 0.0
    assert grads[2] < 0.0


def test_from_samples_refuses() -> None:
    x = torch.randn(4, 3)
    for h in (0.0, -0.3, math.nan):
        with pytest.raises(ValueError, match="bandwidth: a number > 0 expected"):
            GaussianMixture.from_samples(x, h)
    for shape in ((4,), (3,), (1,)):
        with pytest.raises(ValueError, match=r"bandwidth: \(\) or \(\*batch, n or 1, D or 1\) expected"):
            GaussianMixture.from_samples(x, torch.ones(shape))
    for wrong in (x[:0], x[0]):
        with pytest.raises(ValueError, match=r"x: \(\*batch, n, D\) with n and D of at least 1 expected, got \("):
            GaussianMixture.from_samples(wrong, 0.3)
    with pytest.raises(ValueError, match=r"weights: \(\*batch, n\) with n = 4 expected, got \(3,\)"):
        GaussianMixture.from_samples(x, 0.3, weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"x: floating point expected, got torch\.int64"):
        GaussianMixture.from_samples(torch.ones(4, 3, dtype=torch.int64), 0.3)
    negative = GaussianMixture.from_samples(x, torch.tensor(-0.3), weights=torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    assert negative.variances.isnan().all()
    assert negative.log_weights[0].isnan()


@pytest.mark.parametrize(
    "number", [np.float32(0.25), np.float16(0.25), np.float64(0.25), np.array(0.25), np.array(0.25, "f")]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bandwidth_may_be_a_number_of_numpys(number: float, dtype: torch.dtype) -> None:
    """It has the dtype of x, as Python's numbers."""
    x = torch.randn(4, 3, dtype=dtype)
    p = GaussianMixture.from_samples(x, number)
    expected = GaussianMixture.from_samples(x, 0.25)
    assert torch.equal(p.variances, expected.variances)
    assert p.dtype == expected.dtype
    close(csdiv.mmd2(p, p, number), csdiv.mmd2(p, p, 0.25))
    with pytest.raises(ValueError, match="bandwidth: a number > 0 expected"):
        GaussianMixture.from_samples(x, np.float32(-1.0))
    assert GaussianMixture.from_samples(x, np.int64(2)).variances == 4.0


def test_from_samples_of_half_precision_is_float32() -> None:
    """log V of 50 kernels that do not overlap: −log 50 − 3 log(4π h²)/2."""
    x = torch.arange(150.0).view(50, 3).half()
    for h in (1e-4, torch.tensor(1e-4, dtype=torch.float16), torch.full((1, 3), 1e-4, dtype=torch.float16)):
        given = float(torch.as_tensor(h).flatten()[0])
        expected = -math.log(50.0) - 1.5 * math.log(4.0 * math.pi * given**2)
        close(csdiv.log_overlap(GaussianMixture.from_samples(x, h)), torch.tensor(expected), rtol=1e-6, atol=0.0)
    weights = torch.ones(50, dtype=torch.float16)
    close(
        csdiv.log_overlap(GaussianMixture.from_samples(x, 1e-4, weights=weights)),
        torch.tensor(19.9225),
        rtol=0.0,
        atol=5e-5,
    )


@pytest.mark.parametrize("rule", ["scott", "silverman"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bandwidth_rules_are_scipys_in_each_dimension(rule: str, weighted: bool) -> None:
    x = torch.randn(2, 30, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1])
    weights = torch.rand(2, 30, dtype=torch.float64) if weighted else None
    p = GaussianMixture.from_samples(x, rule, weights=weights)
    assert (tuple(p.variances.shape), p.batch_shape, p.structure) == ((2, 1, 3), (2,), "tied diagonal")
    for k in range(2):
        kde = gaussian_kde(x[k].T.numpy(), rule, None if weights is None else weights[k].numpy())
        close(p.variances[k, 0], torch.from_numpy(kde.covariance.diagonal().copy()))
    one = GaussianMixture.from_samples(x[0, :, :1], rule, weights=None if weights is None else weights[0])
    y = torch.randn(5, dtype=torch.float64)
    kde = gaussian_kde(x[0, :, 0].numpy(), rule, None if weights is None else weights[0].numpy())
    close(one.log_prob(y[:, None]), torch.from_numpy(kde.logpdf(y.numpy())))


def test_bandwidth_median_is_of_distances_between_two_samples() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)  # 5, 1, √18
    p = GaussianMixture.from_samples(torch.stack([x, 2.0 * x]), "median")
    close(p.variances, torch.tensor([9.0, 36.0], dtype=torch.float64).view(2, 1, 1))  # σ²/2
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    close(GaussianMixture.from_samples(x, "median", weights=weights).variances, torch.full((1, 1), 0.5).double())
    batch = GaussianMixture.from_samples(x, "median", weights=torch.stack([weights, torch.ones(3).double()]))
    close(batch.variances.flatten(), torch.tensor([0.5, 9.0], dtype=torch.float64))


@pytest.mark.parametrize("rule", ["scott", "silverman", "median"])
def test_bandwidth_of_a_rule_counts_what_has_weight(rule: str) -> None:
    x = torch.randn(2500, 2, dtype=torch.float64)
    weights = torch.ones(2500, dtype=torch.float64)
    padded = torch.cat([x, torch.full((700, 2), math.nan, dtype=torch.float64)])
    none = torch.cat([weights, torch.zeros(700, dtype=torch.float64)])
    expected = GaussianMixture.from_samples(x, rule).variances
    close(GaussianMixture.from_samples(x, rule, weights=3.0 * weights).variances, expected)
    close(GaussianMixture.from_samples(padded, rule, weights=none).variances, expected)


def test_bandwidth_median_of_many_samples() -> None:
    """|x − y|² is 2 χ² of 2 degrees of freedom, whose median is 2 log 2; here of some of them, in sorted order."""
    x = torch.randn(20000, 2, dtype=torch.float64)
    x = x[x[:, 0].argsort()]
    variance = GaussianMixture.from_samples(x, "median").variances.item()
    assert abs(variance - 2.0 * math.log(2.0)) < 0.15
    doubled = torch.ones(20000, dtype=torch.float64)
    doubled[:10] = 1e9  # ten samples have all the weight
    few = GaussianMixture.from_samples(x[:10], "median").variances.item()
    assert abs(GaussianMixture.from_samples(x, "median", weights=doubled).variances.item() / few - 1.0) < 1e-12


def test_bandwidth_of_a_rule_has_no_gradient() -> None:
    x = torch.randn(5, 2, requires_grad=True)
    p = GaussianMixture.from_samples(x, "scott")
    assert p.means.requires_grad
    assert not p.variances.requires_grad
    assert GaussianMixture.from_samples(x.half(), "median").variances.dtype == torch.float32


def test_bandwidth_rules_refuse() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(
        ValueError, match="bandwidth: a number, a tensor or one of 'scott', 'silverman', 'median' expected"
    ):
        GaussianMixture.from_samples(x, "scot")
    with pytest.raises(ValueError, match="bandwidth: at least 2 samples expected for 'scott', got 1"):
        GaussianMixture.from_samples(x[:1], "scott")
    for rule in ("scott", "median"):
        with pytest.raises(ValueError, match=f"bandwidth: '{rule}' is 0"):
            GaussianMixture.from_samples(torch.ones(5, 2), rule)


def test_bandwidth_matrix_is_the_covariance_of_the_kernel() -> None:
    x = torch.randn(2, 20, 3, dtype=torch.float64)
    kde = gaussian_kde(x[0].T.numpy())
    matrix = torch.from_numpy(kde.covariance).requires_grad_()
    p = GaussianMixture.from_samples(x[0], bandwidth_matrix=matrix)
    assert p.structure == "tied full"
    y = torch.randn(5, 3, dtype=torch.float64)
    close(p.log_prob(y), torch.from_numpy(kde.logpdf(y.T.numpy())))
    assert torch.autograd.grad(p.log_prob(y).sum(), matrix)[0].abs().min() > 0.0
    batch = GaussianMixture.from_samples(x, bandwidth_matrix=torch.stack([matrix, 2.0 * matrix]))
    assert (batch.batch_shape, tuple(batch.covariance_matrix.shape)) == ((2,), (2, 1, 3, 3))
    again = GaussianMixture.from_samples(x, bandwidth_matrix=matrix)  # one for the batch
    close(again.log_prob(y)[0], p.log_prob(y))
    for wrong in (torch.ones(3), torch.eye(2), torch.eye(3).expand(20, 3, 3)):
        with pytest.raises(ValueError, match=r"bandwidth_matrix: \(\*batch, D, D\), one for all samples, with D = 3"):
            GaussianMixture.from_samples(x[0], bandwidth_matrix=wrong)
    with pytest.raises(ValueError, match="exactly one of bandwidth, bandwidth_matrix expected"):
        GaussianMixture.from_samples(x)
    with pytest.raises(ValueError, match="exactly one of bandwidth, bandwidth_matrix expected"):
        GaussianMixture.from_samples(x, 0.3, bandwidth_matrix=matrix)
