"""GaussianMixture from and to other libraries' objects: torch.distributions, scikit-learn, samples."""

import math

import pytest
import torch
from mixtures import as_distribution, close, covariances, fitted_by_sklearn, mixture, on_every_structure
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.neighbors import KernelDensity
from torch.distributions import (
    Categorical,
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

# Other libraries' objects


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


SKLEARN_KINDS = {"full": "full", "tied": "tied full", "diag": "diagonal", "spherical": "spherical"}


@pytest.mark.parametrize("estimator", [SklearnMixture, BayesianGaussianMixture])
@pytest.mark.parametrize("kind", list(SKLEARN_KINDS))
def test_from_sklearn_is_the_same_mixture(kind: str, estimator: type) -> None:
    fitted = fitted_by_sklearn(kind, estimator)
    p = GaussianMixture.from_sklearn(fitted)
    assert (p.structure, p.dtype) == (SKLEARN_KINDS[kind], torch.float64)
    x = torch.randn(100, 3, dtype=torch.float64)
    logits = torch.log(torch.from_numpy(fitted.weights_)) + as_distribution(p).component_distribution.log_prob(
        x[:, None]
    )
    close(p.log_prob(x), logits.logsumexp(-1))
    p.means.zero_()
    assert fitted.means_.any()  # a copy


def test_from_sklearn_refuses_the_rest() -> None:
    with pytest.raises(ValueError, match=r"a fitted one expected, call its fit\(\) before"):
        GaussianMixture.from_sklearn(SklearnMixture(3))
    with pytest.raises(TypeError, match=r"a sklearn.mixture.GaussianMixture expected, got dict"):
        GaussianMixture.from_sklearn({})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@on_every_structure
def test_to_sklearn_predicts_the_same(structure: str, dtype: torch.dtype) -> None:
    p = mixture(structure).map(lambda t: t.to(dtype).requires_grad_())
    estimator = p.to_sklearn()
    x = 2.0 * torch.randn(100, 3, dtype=dtype)
    allowed = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}  # its products round in float32
    close(torch.from_numpy(estimator.score_samples(x.numpy())).to(dtype), p.detach().log_prob(x), **allowed)
    close(torch.from_numpy(estimator.predict_proba(x.numpy())).to(dtype), p.detach().responsibilities(x), **allowed)
    assert estimator.sample(5)[0].shape == (5, 3)
    again = GaussianMixture.from_sklearn(estimator)
    assert again.structure == structure.removeprefix("tied " if not structure.endswith("full") else "")
    close(again.means, p.detach().means)
    close(covariances(again), covariances(p.detach()))
    close(again.log_weights, p.detach().log_weights)


def test_to_sklearn_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"one mixture expected, got batch shape \(2,\)"):
        mixture(batch_shape=(2,)).to_sklearn()
    with pytest.raises(ValueError, match="variances: values > 0 expected"):
        GaussianMixture(torch.zeros(2, 3), torch.zeros(1, 1)).to_sklearn()
    uniform = GaussianMixture(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)).to_sklearn()
    assert uniform.weights_.tolist() == [0.5, 0.5]


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


def test_from_distribution_passes_gradients_to_the_scale() -> None:
    scale = (torch.rand(4, 3) + 0.5).requires_grad_()
    p = GaussianMixture.from_distribution(Independent(Normal(torch.zeros(4, 3), scale), 1))
    p.log_prob(torch.ones(1, 3)).sum().backward()
    close(scale.grad, 1.0 / scale.detach() ** 3 - 1.0 / scale.detach())


def test_from_distribution_refuses_the_rest() -> None:
    normal = Normal(torch.zeros(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"wrap it in Independent\(..., 1\)"):
        GaussianMixture.from_distribution(normal)
    with pytest.raises(ValueError, match="one event dimension"):
        GaussianMixture.from_distribution(Independent(normal, 2))
    with pytest.raises(ValueError, match="wrap it"):
        GaussianMixture.from_distribution(
            MixtureSameFamily(Categorical(torch.ones(4)), Normal(torch.zeros(4), torch.ones(4)))
        )
    laplace = Independent(Laplace(torch.zeros(4, 3), torch.ones(4, 3)), 1)
    for other in (laplace, TransformedDistribution(normal, ExpTransform()), Categorical(torch.ones(3))):
        with pytest.raises((TypeError, ValueError), match="expected, got"):
            GaussianMixture.from_distribution(other)
