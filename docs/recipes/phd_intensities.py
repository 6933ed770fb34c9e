"""For multi-object filters: how far apart two PHD intensities are, and which sensor action changes the posterior most.

An intensity is an unnormalised mixture whose weights sum to the expected number of objects. The Cauchy–Schwarz
divergence of two Poisson processes is half the integrated squared error of their intensities (Hoang, Vo, Vo, Mahler,
2015), times the unit of volume; ``log_weights`` are used as given, and an empty intensity is a mixture without weight.
"""

import math

import torch

import csdiv


def poisson_divergence(u: csdiv.GaussianMixture, v: csdiv.GaussianMixture, volume: float = 1.0) -> torch.Tensor:
    """D_CS of two Poisson processes, (*batch,); ``volume`` is the unit in which the state space is measured."""
    return 0.5 * volume * csdiv.ise(u, v)


def update(
    prior: csdiv.GaussianMixture, positions: torch.Tensor, noise: torch.Tensor, detected: float
) -> csdiv.GaussianMixture:
    """The PHD update by one clutter-free measurement per object at ``positions`` (A, J, 2), for A actions at once.

    States are (x, y, vx, vy) with covariance (J, 4, 4), the sensor sees (x, y) with ``noise`` (A, 1) variances.
    """
    covariance = prior.covariance_matrix
    innovation = covariance[..., :2, :2] + noise[..., None, None] * torch.eye(2)
    gain = covariance[..., :2] @ torch.linalg.inv(innovation)  # (A, J, 4, 2)
    means = prior.means + (gain @ (positions - prior.means[..., :2]).unsqueeze(-1)).squeeze(-1)
    posterior = covariance - gain @ covariance[..., :2, :]
    missed = prior.log_weights + math.log1p(-detected)
    seen = torch.zeros(means.shape[:-1])  # without clutter a measurement is one object for sure
    return csdiv.GaussianMixture(
        torch.cat([means, prior.means.expand_as(means)], -2),
        covariance_matrix=torch.cat([0.5 * (posterior + posterior.mT), covariance.expand_as(posterior)], -3),
        log_weights=torch.cat([seen, missed.expand_as(seen)], -1),
    )


def main() -> tuple[float, list[float]]:
    torch.manual_seed(0)
    objects = 5
    means = torch.randn(objects, 4) * torch.tensor([50.0, 50.0, 5.0, 5.0])
    root = torch.randn(objects, 4, 4).tril() + 4.0 * torch.eye(4)
    prior = csdiv.GaussianMixture(means, covariance_matrix=root @ root.mT, log_weights=torch.full((objects,), -0.1))
    nothing = csdiv.GaussianMixture(
        means, covariance_matrix=root @ root.mT, log_weights=torch.full((objects,), -math.inf)
    )
    print(f"{prior.log_weights.exp().sum():.2f} objects against none: {poisson_divergence(prior, nothing, 1e4):.3f}")

    noise = torch.tensor([[100.0], [10.0], [1.0]])  # of three sensor actions, the best one last
    posteriors = update(prior, prior.means[:, :2].expand(3, -1, -1), noise, detected=0.95)  # batch (3,)
    gains = poisson_divergence(posteriors, prior, 1e4).tolist()
    for variance, gain in zip(noise[:, 0].tolist(), gains, strict=True):
        print(f"measurement variance {variance:5.0f}: divergence of the posterior from the prior {gain:.3f}")
    return poisson_divergence(prior, nothing, 1e4).item(), gains


if __name__ == "__main__":
    main()
