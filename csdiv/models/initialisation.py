"""The prior's starting point: k-means on the codes of a warmed-up encoder."""

from __future__ import annotations

import torch

from csdiv import GaussianMixture
from csdiv.nn import GaussianMixturePrior


@torch.no_grad()
def initialize_from_codes_(
    prior: GaussianMixturePrior, codes: GaussianMixture, *, variance_floor: float = 1e-3, seed: int = 0
) -> None:
    """Sets a prior to the k-means clusters of codes, in place.

    A cluster C gives ν_k = mean of m_b, t_k = variance of m_b + mean of s_b (the moments of the codes' mixture,
    floored) and π_k ∝ max(|C|, 1): a cluster that k-means leaves empty keeps its centre and the floor.

    Args:
        prior: K components in D dimensions with diagonal covariance.
        codes: n ≥ K posterior codes N(m_b, diag s_b) as one mixture.
        variance_floor: smallest t_k, > 0.
        seed: of k-means (k-means++, best of 10).

    Raises:
        ValueError: fewer codes than components, or codes that are not finite.
    """
    from sklearn.cluster import KMeans

    k, means, variances = prior.num_components, codes.means, codes.variances
    if means.shape[0] < k:
        raise ValueError(f"at least {k} codes for {k} components expected, got {means.shape[0]}")
    if not (means.isfinite().all() and variances.isfinite().all()):
        raise ValueError("finite codes expected: the warm-up has diverged")
    labels = KMeans(k, n_init=10, random_state=seed).fit_predict(means.cpu().double().numpy())
    member = torch.nn.functional.one_hot(torch.as_tensor(labels, device=means.device).long(), k).to(means)
    counts = member.sum(0).clamp(min=1.0)
    centres = member.T @ means / counts[:, None]
    spread = member.T @ ((means - centres[labels]) ** 2 + variances) / counts[:, None]
    prior.initialize_(centres, spread.clamp(min=variance_floor), counts)
