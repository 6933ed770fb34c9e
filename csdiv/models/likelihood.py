"""Importance-sampled likelihoods, under several priors from the same decoded samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from csdiv import GaussianMixture, log_overlap
from csdiv.models.autoencoder import Autoencoder

PROPOSAL_WEIGHTS = (0.5, 0.3, 0.2)
PROPOSAL_SCALES = (1.0, 2.0, 4.0)
DECODED_ROWS = 512  # samples of z in one pass of the decoder: its activations stay in the cache

LogDensity = Callable[[Tensor], Tensor]
"""(*batch, S, D) -> (*batch, S) nats."""


@dataclass(frozen=True)
class Likelihood:
    """Importance-sampled negative log likelihood per image, (n,) nats, with its effective sample sizes (n,).

    ``nll_tenth`` is the estimate from the first tenth of the samples: where it lies well above, both are mere bounds.
    """

    nll: Tensor
    effective_sample_size: Tensor
    nll_tenth: Tensor
    num_samples: int


def importance_sampled_nll(model: Autoencoder, x: Tensor, num_samples: int = 1000) -> Likelihood:
    """−log p(x) under the model's own prior: :func:`importance_sampled_nlls` with that alone."""
    return importance_sampled_nlls(model, x, {"own": model.prior_mixture().log_prob}, num_samples)["own"]


@torch.no_grad()
def importance_sampled_nlls(
    model: Autoencoder, x: Tensor, priors: Mapping[str, LogDensity], num_samples: int = 1000
) -> dict[str, Likelihood]:
    """−log p(x) by importance sampling with the wide proposal, for each prior.

    p(x) ≈ 1/S Σ_s p(x|z_s) p(z_s) / r(z_s),  z_s ~ r = .5 N(m, s) + .3 N(m, 2s) + .2 N(m, 4s),  N(m, s) = q(z|x)

    The estimate is an upper bound in expectation. The effective sample size (Σ w)² / Σ w² ranges from 1, where the
    bound is loose, to S. The wide parts keep the weights bounded where the encoder's variance is below the posterior's.

    Args:
        x: (n, P); for a Bernoulli decoder in {0, 1}, as gray levels have no likelihood.
        priors: log p(z) by name; all are evaluated at the same z, and p(x|z) once.
        num_samples: S. Memory is O(S · D) beside DECODED_ROWS rows of the decoder's activations.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in priors}
    tenth = max(1, num_samples // 10)
    for image in x:
        means, log_variances = model.encoder(image.unsqueeze(0))  # (1, D)
        scales = means.new_tensor(PROPOSAL_SCALES).unsqueeze(-1)
        proposal = GaussianMixture(
            means.expand(len(scales), -1),
            log_variances.exp() * scales,
            log_weights=means.new_tensor(PROPOSAL_WEIGHTS).log(),
        )
        z = proposal.sample(num_samples)  # (S, D)
        log_likelihood = -torch.cat(
            [model.decoder.negative_log_likelihood(rows, image) for rows in z.split(DECODED_ROWS)]
        )
        log_ratio = log_likelihood - proposal.log_prob(z)
        for name, log_density in priors.items():
            log_weights = log_ratio + log_density(z)
            found[name].append(
                (
                    math.log(num_samples) - log_weights.logsumexp(-1),
                    1.0 / log_weights.softmax(-1).square().sum(-1),
                    math.log(tenth) - log_weights[:tenth].logsumexp(-1),
                )
            )
    columns = {name: [torch.stack(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    return {name: Likelihood(nll, size, tenths, num_samples) for name, (nll, size, tenths) in columns.items()}


def squared_prior(prior: GaussianMixture) -> LogDensity:
    """The density p²/V(p, p): what codes that minimise D_CS are distributed like where they are narrow."""
    norm = log_overlap(prior)
    return lambda z: 2.0 * prior.log_prob(z) - norm


@torch.no_grad()
def refitted_prior(codes: GaussianMixture, num_components: int, *, seed: int = 0) -> GaussianMixture:
    """A diagonal mixture fitted by expectation maximisation to one draw of each code.

    Args:
        codes: the n codes of a training split as one mixture, see :meth:`Autoencoder.encode`.
        num_components: K ≤ n.
        seed: of the draws and of k-means, from which it starts.
    """
    from sklearn.mixture import GaussianMixture as Estimator

    assert codes.variances is not None
    noise = torch.randn(codes.means.shape, generator=torch.Generator().manual_seed(seed)).to(codes.means)
    z = (codes.means + codes.variances.sqrt() * noise).cpu().double().numpy()
    estimator = Estimator(num_components, covariance_type="diag", reg_covar=1e-5, max_iter=50, random_state=seed)
    fitted = GaussianMixture.from_sklearn(_fit_quietly(estimator, z))
    return fitted.to(codes.means.device, codes.means.dtype)


def _fit_quietly(estimator: object, z: object) -> object:
    """50 steps of expectation maximisation are enough here: no warning that it could go on."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(z)  # type: ignore[attr-defined]
