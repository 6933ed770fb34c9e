"""The modules, and cs_regularizer as the one-line swap inside a variational autoencoder."""

import copy
import io
import math
import pickle
import time
from typing import Any

import pytest
import torch
from entries import BACKENDS
from torch import Tensor
from torch.distributions import Independent, Normal

import csdiv
from csdiv import GaussianMixture, testing
from csdiv.nn import CSDivergenceLoss, GaussianMixturePrior

COVARIANCES = {"diag": (5, 3), "spherical": (5, 1), "tied": (1, 3), "tied_spherical": (1, 1)}
close = torch.testing.assert_close
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def mixture(k: int = 5, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, dtype=torch.float64, **options)


def codes(b: int = 6, d: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(b, d, dtype=dtype).requires_grad_(), torch.randn(b, d, dtype=dtype).requires_grad_()


# CSDivergenceLoss


@on_every_backend
def test_loss_reductions(backend: str) -> None:
    p, q = mixture(batch_shape=(4,)), mixture(batch_shape=(4,))
    value = csdiv.cs_divergence(p, q, backend=backend)
    assert torch.equal(CSDivergenceLoss("none", backend)(p, q), value)
    assert torch.equal(CSDivergenceLoss("sum", backend)(p, q), value.sum())
    assert torch.equal(CSDivergenceLoss(backend=backend)(p, q), value.mean())
    assert repr(CSDivergenceLoss("sum", backend)) == f"CSDivergenceLoss(reduction='sum', backend={backend!r})"


@pytest.mark.parametrize("reduction", ["avg", "Mean", "", None])
def test_loss_refuses_other_reductions(reduction: str) -> None:
    with pytest.raises(ValueError, match=f"reduction: one of 'none', 'mean', 'sum' expected, got {reduction!r}"):
        CSDivergenceLoss(reduction)


@on_every_backend
def test_loss_of_a_batch_of_gaussians_against_one_prior(backend: str) -> None:
    means, log_variances = codes()
    posterior = Independent(Normal(means, (0.5 * log_variances).exp()), 1)
    prior = GaussianMixturePrior(5, 3).double()
    value = CSDivergenceLoss("none", backend)(posterior, prior)
    expected = csdiv.cs_regularizer(means, log_variances, prior, backend=backend)
    close(value, expected)
    inputs = [means, log_variances, *prior.parameters()]
    close(torch.autograd.grad(value.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


# GaussianMixturePrior


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_is_a_mixture_with_parameters(covariance: str) -> None:
    prior = GaussianMixturePrior(5, 3, covariance)
    p = prior()
    assert (p.num_components, p.dim, p.variances.shape) == (5, 3, COVARIANCES[covariance])
    close(p.log_weights, torch.full((5,), -math.log(5.0)))
    assert torch.equal(p.variances, torch.ones(COVARIANCES[covariance]))
    assert set(dict(prior.named_parameters())) == {"means", "log_variances", "logits"}
    assert f"covariance='{covariance}'" in repr(prior)
    for entry in (csdiv.log_overlap(prior), csdiv.cs_divergence(mixture(), prior)):
        prior.zero_grad()
        entry.backward()
        assert all(t.grad is not None for t in prior.parameters())
    loaded = GaussianMixturePrior(5, 3, covariance)
    loaded.load_state_dict(prior.state_dict())
    assert torch.equal(csdiv.log_overlap(loaded), csdiv.log_overlap(copy.deepcopy(prior)))


def reloaded(value: object, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_modules_are_saved_and_copied(covariance: str) -> None:
    prior, loss = GaussianMixturePrior(5, 3, covariance), CSDivergenceLoss("none", "reference")
    torch.nn.init.normal_(prior.logits)
    state = reloaded({"prior": prior.state_dict(), "loss": loss.state_dict(), "mixture": prior()}, weights_only=True)
    loaded = GaussianMixturePrior(5, 3, covariance)
    loaded.load_state_dict(state["prior"])
    loss.load_state_dict(state["loss"])
    priors = [loaded, *(make(prior) for make in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))]
    for other in (state["mixture"], reloaded(prior, weights_only=False), *priors):
        assert torch.equal(csdiv.log_overlap(other), csdiv.log_overlap(prior))
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), reloaded(loss, weights_only=False)):
        assert repr(other) == repr(loss)
        assert torch.equal(other(prior, loaded), loss(prior, loaded))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_takes_over_given_values(covariance: str) -> None:
    prior = GaussianMixturePrior(5, 3, covariance)
    means, variances, weights = torch.randn(5, 3), torch.rand(COVARIANCES[covariance]) + 0.5, torch.rand(5) + 0.1
    assert prior.initialize_(means, variances, weights) is prior
    p = prior()
    assert torch.equal(p.means, means)
    close(p.variances, variances)
    close(p.log_weights.exp(), weights / weights.sum())
    close(prior.initialize_(means, variances)().log_weights.exp(), torch.full((5,), 0.2))
    assert all(t.requires_grad for t in prior.parameters())


def test_prior_refuses_what_makes_no_mixture() -> None:
    for sizes in ((0, 3), (3, 0), (-1, 3)):
        with pytest.raises(ValueError, match="num_components and dim of at least 1 expected"):
            GaussianMixturePrior(*sizes)
    with pytest.raises(
        ValueError, match="covariance: one of 'diag', 'spherical', 'tied', 'tied_spherical' expected, got 'full'"
    ):
        GaussianMixturePrior(5, 3, "full")


# cs_regularizer


def one_by_one(means: Tensor, log_variances: Tensor, prior: GaussianMixture) -> Tensor:
    """D_CS of each code from the prior, a single Gaussian at a time, by the reference."""
    pairs = zip(means, log_variances, strict=True)
    return torch.stack(
        [csdiv.cs_divergence(GaussianMixture(m[None], v.exp()[None]), prior, backend="reference") for m, v in pairs]
    )


@on_every_backend
def test_regularizer_is_the_divergence_of_each_code(backend: str) -> None:
    means, log_variances = codes()
    prior = mixture().map(lambda t: t.requires_grad_())
    inputs = [means, log_variances, prior.means, prior.variances, prior.log_weights]
    value, expected = (
        csdiv.cs_regularizer(means, log_variances, prior, backend=backend),
        one_by_one(means, log_variances, prior),
    )
    close(value, expected)
    upstream = torch.randn(6, dtype=torch.float64)
    close(torch.autograd.grad(value, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@on_every_backend
def test_regularizer_of_batches_of_codes(backend: str) -> None:
    means, log_variances = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    prior, priors = mixture(), mixture(batch_shape=(2,))
    expected = torch.stack([one_by_one(m, v, prior) for m, v in zip(means, log_variances, strict=True)])
    close(csdiv.cs_regularizer(means, log_variances, prior, backend=backend), expected)
    expected = torch.stack(
        [
            one_by_one(m, v, priors.map(lambda t, i=i: t[i]))
            for i, (m, v) in enumerate(zip(means, log_variances, strict=True))
        ]
    )
    close(csdiv.cs_regularizer(means, log_variances, priors, backend=backend), expected)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-200.0, -90.0, 90.0, 200.0])
@pytest.mark.parametrize("prior_variance", [1e-30, 1.0, 1e30])
def test_regularizer_is_finite_for_extreme_log_variances(
    prior_variance: float, log_variance: float, dtype: torch.dtype, backend: str
) -> None:
    means = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    log_variances = torch.full((2, 3), log_variance, dtype=dtype)
    log_variances[1, 0] = 0.5  # and beside a plain one
    log_variances.requires_grad_()
    prior = GaussianMixture(torch.zeros(1, 3, dtype=dtype), torch.full((1, 3), prior_variance, dtype=dtype))
    prior = prior.map(lambda t: t.requires_grad_())
    value = csdiv.cs_regularizer(means, log_variances, prior, backend=backend)
    v, t = log_variances.detach().double(), torch.tensor(prior_variance, dtype=torch.float64).log()
    half = 0.5 * (v - t)
    expected = 0.5 * (half.abs() + torch.log1p(torch.exp(-2.0 * half.abs())) - math.log(2.0))  # ½ log cosh
    scale = float(expected.sum(-1).max()) + float((v.abs() + t.abs()).sum(-1).max())
    close(value.double(), expected.sum(-1), rtol=0.0, atol=8.0 * torch.finfo(dtype).eps * scale)
    value.sum().backward()
    # On a GPU shares are taken of rows that were rounded to float64, logarithms of variances and all.
    rounded = scale if dtype == torch.float64 and backend not in ("reference", "cpu") else 1.0
    close(log_variances.grad.double(), 0.25 * half.tanh(), rtol=0.0, atol=16.0 * torch.finfo(dtype).eps * rounded)
    assert not means.grad.any()
    assert prior.variances.grad.isfinite().all()


@on_every_backend
def test_regularizer_with_a_precomputed_self_term(backend: str) -> None:
    means, log_variances = codes()
    prior = mixture().map(lambda t: t.requires_grad_())
    inputs = [prior.means, prior.variances, prior.log_weights]
    fresh = csdiv.cs_regularizer(means, log_variances, prior, backend=backend)
    own = csdiv.log_overlap(prior, backend=backend)
    given = csdiv.cs_regularizer(means, log_variances, prior, prior_self_overlap=own, backend=backend)
    frozen = csdiv.cs_regularizer(means, log_variances, prior, prior_self_overlap=own.detach(), backend=backend)
    close(given, fresh)
    assert torch.equal(given, frozen)
    expected = torch.autograd.grad(fresh.sum(), inputs, retain_graph=True)
    close(torch.autograd.grad(given.sum(), inputs, retain_graph=True), expected)
    without = torch.autograd.grad(frozen.sum(), inputs)
    half = torch.autograd.grad(0.5 * means.shape[0] * own, inputs)
    close([a + b for a, b in zip(without, half, strict=True)], list(expected))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_regularizer_with_a_self_term_does_not_compute_it(backend: str) -> None:
    """One code against 3 000 components: the self term has 1 500 times as many pairs."""
    means, log_variances = torch.zeros(1, 1), torch.zeros(1, 1)
    prior = testing.random_mixture(3000, 1)
    own = csdiv.log_overlap(prior, backend=backend)

    def seconds(known: torch.Tensor | None) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            csdiv.cs_regularizer(means, log_variances, prior, prior_self_overlap=known, backend=backend)
            times.append(time.perf_counter() - start)
        return min(times)

    assert 4.0 * seconds(own) < seconds(None)


@on_every_backend
def test_training_against_a_learned_prior_descends(backend: str) -> None:
    torch.manual_seed(1)
    means, log_variances = torch.nn.Parameter(torch.randn(32, 2) * 2.0), torch.nn.Parameter(torch.zeros(32, 2))
    prior = GaussianMixturePrior(4, 2)
    optimizer = torch.optim.Adam([means, log_variances, *prior.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        loss = csdiv.cs_regularizer(means, log_variances, prior, backend=backend).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
