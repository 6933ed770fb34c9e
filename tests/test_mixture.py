"""GaussianMixture: a value; its densities, draws and assignments against torch, SciPy and scikit-learn."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from entries import BACKENDS
from scipy import stats
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.neighbors import KernelDensity
from torch import Tensor
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
from torch.utils import _pytree as pytree

import csdiv
from csdiv import GaussianMixture, testing

STRUCTURES = [s for s in testing.STRUCTURES if s != "points"]
FIELDS = ("means", "variances", "log_weights", "scale_tril", "covariance_matrix")
close = torch.testing.assert_close

on_every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def mixture(structure: str = "diagonal", k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, structure=structure, dtype=torch.float64, **options)


def covariances(p: GaussianMixture) -> Tensor:
    """(K, D, D)."""
    if p.variances is not None:
        return p.variances.expand(p.num_components, p.dim).diag_embed()
    s = p.scale_tril @ p.scale_tril.mT if p.covariance_matrix is None else p.covariance_matrix
    return s.expand(p.num_components, p.dim, p.dim)


def as_distribution(p: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=p.log_weights), MultivariateNormal(p.means, covariances(p)))


def same(p: GaussianMixture, q: GaussianMixture) -> bool:
    pairs = [(getattr(p, name), getattr(q, name)) for name in FIELDS]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


# A value


@on_every_structure
def test_structure_is_the_shape(structure: str) -> None:
    p = mixture(structure, batch_shape=(2,))
    assert (p.structure, p.num_components, p.dim, p.batch_shape) == (structure, 4, 3, (2,))
    assert structure in repr(p)
    assert "num_components=4, dim=3" in repr(p)
    assert "batch_shape=(2,)" in repr(p)


def test_structure_of_one_component_or_dimension_is_plain() -> None:
    assert GaussianMixture(torch.zeros(1, 3), torch.ones(1, 3)).structure == "diagonal"
    assert GaussianMixture(torch.zeros(3, 1), torch.ones(3, 1)).structure == "diagonal"
    assert GaussianMixture(torch.zeros(1, 3), scale_tril=torch.eye(3)[None]).structure == "full"


def test_immutable() -> None:
    p = mixture()
    with pytest.raises(AttributeError, match="immutable: means cannot be set"):
        p.means = torch.zeros(4, 3)
    with pytest.raises(AttributeError, match="immutable: means cannot be deleted"):
        del p.means
    with pytest.raises(AttributeError, match="immutable: label cannot be set"):
        p.label = "a"


def test_tensors_stay_the_callers_own() -> None:
    means, variances, log_weights = torch.zeros(4, 3), torch.ones(1, 1), torch.zeros(4)
    p = GaussianMixture(means, variances, log_weights)
    assert p.means is means
    assert p.variances is variances
    assert p.log_weights is log_weights


@on_every_structure
def test_pytree_pickle_and_copies(structure: str) -> None:
    p = mixture(structure)
    leaves, spec = pytree.tree_flatten({"p": p})
    assert all(isinstance(t, Tensor) or t is None for t in leaves)
    doubled = pytree.tree_unflatten([None if t is None else 2.0 * t for t in leaves], spec)["p"]
    assert torch.equal(doubled.means, 2.0 * p.means)
    for q in (pickle.loads(pickle.dumps(p)), copy.deepcopy(p), copy.copy(p), pytree.tree_map(lambda t: t, p)):
        assert isinstance(q, GaussianMixture)
        assert same(p, q)
        assert q.structure == structure
    assert copy.deepcopy(p).means.data_ptr() != p.means.data_ptr()


def test_to_and_detach() -> None:
    p = mixture().map(lambda t: t.requires_grad_())
    low = p.to(torch.float32)
    assert {t.dtype for t in (low.means, low.variances, low.log_weights)} == {torch.float32}
    csdiv.log_overlap(low).backward()
    assert p.means.grad.dtype == torch.float64
    assert not p.detach().means.requires_grad
    assert p.detach().means.data_ptr() == p.means.data_ptr()
    assert p.to("meta").device.type == "meta"


def test_weights_as_given_normalised_and_uniform() -> None:
    means, one = torch.randn(4, 3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log()
    given, logits = GaussianMixture(means, one, weights), GaussianMixture(means, one, logits=weights)
    assert torch.equal(given.log_weights, weights)
    close(logits.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    close(given.normalized().log_weights, logits.log_weights)
    close(csdiv.log_overlap(given) - csdiv.log_overlap(logits), torch.tensor(2.0 * math.log(10.0), dtype=torch.float64))
    uniform = GaussianMixture(means, one)
    assert uniform.normalized() is uniform
    same_weights = GaussianMixture(means, one, torch.full((4,), -math.log(4.0), dtype=torch.float64))
    close(csdiv.log_overlap(uniform), csdiv.log_overlap(same_weights))


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


def fitted_by_sklearn(kind: str, estimator: type = SklearnMixture) -> SklearnMixture:
    data = torch.cat(
        [torch.randn(60, 3, dtype=torch.float64) * s + m for s, m in ((0.5, -1.0), (1.0, 0.5), (0.3, 2.0))]
    )
    return estimator(n_components=3, covariance_type=kind, random_state=0).fit(data.numpy())


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
    assert grads[1][1] == 0.0
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
    assert negative.log_weights.isnan().all()


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


# Densities, responsibilities, assignment


@pytest.mark.parametrize("backend", BACKENDS)
@on_every_structure
def test_log_prob_is_that_of_torch_and_scipy(structure: str, backend: str) -> None:
    p = mixture(structure)
    backend = "auto" if structure.endswith("full") else backend
    x = 2.0 * torch.randn(50, 3, dtype=torch.float64)
    found = p.log_prob(x, backend=backend)
    close(found, as_distribution(p).log_prob(x))
    densities = [
        stats.multivariate_normal(m.numpy(), s.numpy()).pdf(x.numpy())
        for m, s in zip(p.means, covariances(p), strict=True)
    ]
    close(found.exp(), sum(w * torch.from_numpy(d) for w, d in zip(p.log_weights.exp(), densities, strict=True)))


LARGE = """
import resource, torch
from csdiv import testing
p, x = testing.random_mixture(20000, 16), torch.randn(20000, 16)
p.log_prob(x[:10])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
p.log_prob(x, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB is Linux's")
def test_log_prob_takes_memory_for_points_and_components_alone() -> None:
    """16 times the inputs at most; one matrix of points by components would be 1526 MiB."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 16 * 2 * 20000 * 16 * 4 / 1024


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_prob_of_many_components_is_that_of_sklearn(backend: str) -> None:
    p = testing.random_mixture(2000, 16, dtype=torch.float64)
    x = torch.randn(3000 if backend == "cpu" else 100, 16, dtype=torch.float64)
    expected = torch.from_numpy(p.to_sklearn().score_samples(x.numpy()))
    close(p.log_prob(x, backend=backend), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_responsibilities_and_assignment_are_those_of_sklearn(kind: str, backend: str) -> None:
    fitted = fitted_by_sklearn(kind)
    p = GaussianMixture.from_sklearn(fitted)
    backend = "reference" if p.variances is None else backend
    x = 3.0 * torch.randn(100, 3, dtype=torch.float64)
    close(p.log_prob(x, backend=backend), torch.from_numpy(fitted.score_samples(x.numpy())))
    close(p.responsibilities(x, backend=backend), torch.from_numpy(fitted.predict_proba(x.numpy())))
    assert torch.equal(p.assign(x, backend=backend), torch.from_numpy(fitted.predict(x.numpy())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_responsibilities_and_assignment_of_codes(backend: str) -> None:
    """A mixture in the place of points: each of its components, with its variance added."""
    p, codes = mixture(), mixture(k=9)
    wider = [GaussianMixture(p.means, p.variances + v, p.log_weights) for v in codes.variances]
    expected = torch.cat(
        [w.responsibilities(m[None], backend=backend) for w, m in zip(wider, codes.means, strict=True)]
    )
    close(p.responsibilities(codes, backend=backend), expected)
    close(expected.sum(-1), torch.ones(9, dtype=torch.float64))
    assert torch.equal(p.assign(codes, backend=backend), expected.argmax(-1))


# Draws


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
    p = GaussianMixture(torch.tensor([[0.0], [10.0], [20.0]]), torch.full((1, 1), 1e-6), lone)
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


# Full covariances


@on_every_structure
def test_every_structure_equals_its_full_matrix(structure: str) -> None:
    """Values and gradients of a structure are those of the matrices that it stands for."""
    p, q = mixture(structure).map(lambda t: t.requires_grad_()), mixture(k=5)
    full = GaussianMixture(p.means, covariance_matrix=covariances(p), log_weights=p.log_weights)
    inputs = [t for t in (p.means, p.variances, p.scale_tril, p.log_weights) if t is not None]
    for function in (csdiv.cs_divergence, csdiv.log_overlap, csdiv.component_log_overlap, csdiv.pairwise_log_overlap):
        values = [function(side, q) for side in (p, full)]
        close(*values)
        close(*(torch.autograd.grad(v.sum(), inputs, materialize_grads=True, retain_graph=True) for v in values))


def test_full_covariances_pass_gradcheck() -> None:
    p, q = mixture("full", 2, 2), mixture("tied full", 3, 2)
    inputs = [t.requires_grad_() for t in (p.means, p.scale_tril, p.log_weights, q.means, q.scale_tril)]

    def divergence(pm: Tensor, pr: Tensor, pw: Tensor, qm: Tensor, qr: Tensor) -> Tensor:
        return csdiv.cs_divergence(
            GaussianMixture(pm, scale_tril=pr.tril(), log_weights=pw), GaussianMixture(qm, scale_tril=qr.tril())
        )

    assert torch.autograd.gradcheck(divergence, inputs)
    assert torch.autograd.gradgradcheck(divergence, inputs)


def test_full_overlap_of_two_gaussians_is_a_density() -> None:
    p, q = mixture("full"), mixture("full")
    pairs = csdiv.pairwise_log_overlap(p, q)
    s, t = covariances(p), covariances(q)
    expected = MultivariateNormal(q.means, s[:, None] + t).log_prob(p.means[:, None])
    close(pairs, expected)
