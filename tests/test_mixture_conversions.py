"""GaussianMixture from and to scikit-learn, and from SciPy."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from mixtures import as_distribution, close, covariances, fitted_by_sklearn, mixture, on_every_structure
from scipy.stats import gaussian_kde
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.neighbors import KernelDensity

import csdiv
from csdiv import GaussianMixture

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
    with pytest.raises(TypeError, match="or KernelDensity of scikit-learn expected, got dict"):
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


def test_to_sklearn_of_needles() -> None:
    """Factors in float64: float32 has none of this matrix."""
    direction = torch.tensor([1.0, 1.0], dtype=torch.float64) / 2.0**0.5
    needle = (torch.outer(direction, direction) + 1e-7 * torch.eye(2, dtype=torch.float64)).float()
    p = GaussianMixture(torch.zeros(1, 2), covariance_matrix=needle.unsqueeze(0))
    exact = needle.double().inverse()
    close(torch.from_numpy(p.to_sklearn().precisions_[0]), exact.float())
    close(
        GaussianMixture.from_distribution(p.to_distribution()).log_prob(torch.zeros(1, 2)),
        p.log_prob(torch.zeros(1, 2)),
    )
    with pytest.raises(ValueError, match="covariance_matrix: positive definite expected"):
        p._unchecked(means=p.means, covariance_matrix=-p.covariance_matrix).to_sklearn()


def test_to_sklearn_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"one mixture expected, got batch shape \(2,\)"):
        mixture(batch_shape=(2,)).to_sklearn()
    with pytest.raises(ValueError, match="variances: values > 0 expected"):
        GaussianMixture(torch.zeros(2, 3), torch.zeros(1, 1)).to_sklearn()
    uniform = GaussianMixture(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)).to_sklearn()
    assert uniform.weights_.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("structure", ["diagonal", "tied full", "full"])
def test_to_sklearn_can_be_fitted_further(structure: str) -> None:
    """With warm_start, from the parameters that the mixture has: one step stays near a converged fit."""
    data = torch.cat([torch.randn(50, 3) + m for m in (-5.0, 5.0)]).double().numpy()
    fitted = SklearnMixture(
        2, covariance_type="diag" if structure == "diagonal" else structure.split()[0], random_state=0
    )
    p = GaussianMixture.from_sklearn(fitted.fit(data))
    estimator = p.to_sklearn().set_params(warm_start=True, max_iter=20).fit(data)
    np.testing.assert_allclose(estimator.means_, fitted.means_, atol=1e-6)
    assert np.isfinite(estimator.lower_bound_)


def test_from_sklearn_of_bayesian_mixtures_is_what_sample_draws_from() -> None:
    """score_samples is no log density: its exponential does not integrate to one."""
    fitted = BayesianGaussianMixture(n_components=3, random_state=0).fit(np.random.default_rng(0).normal(size=(20, 1)))
    p = GaussianMixture.from_sklearn(fitted)
    grid = torch.linspace(-30.0, 30.0, 6001, dtype=torch.float64).unsqueeze(-1)
    close(p.log_prob(grid).exp().sum() * 0.01, torch.tensor(1.0).double(), rtol=1e-6, atol=0.0)
    assert np.exp(fitted.score_samples(grid.numpy())).sum() * 0.01 < 0.97


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("algorithm", ["kd_tree", "ball_tree"])
def test_from_sklearn_of_kernel_density(algorithm: str, weighted: bool) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 200, 3))
    weights = np.linspace(0.0, 1.0, 200) if weighted else None
    kde = KernelDensity(bandwidth="scott", algorithm=algorithm).fit(
        x, sample_weight=None if weights is None else weights + 1e-3
    )
    p = GaussianMixture.from_sklearn(kde)
    assert (p.structure, p.num_components, p.log_weights is None) == ("tied spherical", 200, not weighted)
    close(p.log_prob(y), torch.from_numpy(kde.score_samples(y)))
    p.means.zero_()
    close(GaussianMixture.from_sklearn(kde).means, torch.from_numpy(x))  # a copy, in the order given


def test_from_sklearn_refuses_other_kernel_densities() -> None:
    x = np.zeros((5, 3))
    with pytest.raises(ValueError, match="the kernel 'gaussian' expected, got 'tophat'"):
        GaussianMixture.from_sklearn(KernelDensity(kernel="tophat").fit(x))
    for metric, parameters in (("manhattan", None), ("minkowski", {"p": 1})):
        with pytest.raises(ValueError, match=f"the metric 'euclidean' expected, got '{metric}'"):
            GaussianMixture.from_sklearn(KernelDensity(metric=metric, metric_params=parameters).fit(x))
    assert GaussianMixture.from_sklearn(KernelDensity(metric="minkowski").fit(x)).dim == 3
    with pytest.raises(ValueError, match=r"a fitted one expected, call its fit\(\) before"):
        GaussianMixture.from_sklearn(KernelDensity())


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_from_scipy_is_the_same_density(dim: int, weighted: bool) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, dim, 50))
    kde = gaussian_kde(x, weights=np.linspace(0.0, 1.0, 50) if weighted else None)
    p = GaussianMixture.from_scipy(kde)
    assert (p.structure, p.log_weights is None) == ("tied full" if dim > 1 else "tied diagonal", not weighted)
    close(p.log_prob(y.T), torch.from_numpy(kde.pdf(y)).log())  # its logpdf is NaN for a weight of zero
    with pytest.raises(TypeError, match=r"density: scipy\.stats\.gaussian_kde expected, got dict"):
        GaussianMixture.from_scipy({})


def test_functions_take_other_libraries_objects() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    q = mixture()
    made = {
        "from_sklearn": [
            fitted_by_sklearn("full"),
            fitted_by_sklearn("diag", BayesianGaussianMixture),
            KernelDensity().fit(x),
        ],
        "from_scipy": [gaussian_kde(x.T)],
    }
    for name, values in made.items():
        for value in values:
            p = getattr(GaussianMixture, name)(value)
            for function in (csdiv.cs_divergence, csdiv.ise, csdiv.component_log_overlap):
                close(function(value, q), function(p, q))
                close(function(q, value), function(q, p))
            close(csdiv.renyi2_entropy(value), csdiv.renyi2_entropy(p))
            close(csdiv.mmd2(value, q, 0.5), csdiv.mmd2(p, q, 0.5))
            close(csdiv.nn.CSDivergenceLoss()(value, q), csdiv.cs_divergence(p, q))
            codes = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
            close(csdiv.cs_regularizer(*codes, value), csdiv.cs_regularizer(*codes, p))


def test_other_types_are_refused_by_their_full_names_and_nothing_is_imported() -> None:
    code = """
import sys, torch, csdiv
class GaussianMixture: pass
try:
    csdiv.log_overlap(GaussianMixture())
except TypeError as error:
    print(error)
print(*({"sklearn", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    expected = "or a mixture of torch, scikit-learn or SciPy expected, got __main__.GaussianMixture\n\n"
    assert done.stdout.endswith(expected), done.stderr
