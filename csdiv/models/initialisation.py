"""The prior's starting point: k-means on the codes of a warmed-up encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from csdiv.nn import GaussianMixturePrior


@torch.no_grad()
def initialize_from_codes_(
    prior: GaussianMixturePrior, means: Tensor, variances: Tensor, *, variance_floor: float = 1e-3, seed: int = 0
) -> None:
    """Sets a prior to the k-means clusters of the codes N(m_b, diag s_b), in place.

    A cluster C gives ν_k = mean of m_b, t_k = variance of m_b + mean of s_b, floored, and π_k ∝ |C|. A cluster that
    k-means leaves empty, as it can for repeated codes, keeps its centre, with the floor and the weight of one code.

    Args:
        prior: K components in D dimensions with diagonal covariance.
        means, variances: (n, D) m_b and s_b of n ≥ K codes.
        variance_floor: smallest t_k, > 0.
        seed: of k-means (k-means++, best of 10).

    Raises:
        ValueError: fewer codes than components, or codes that are not finite.
    """
    from sklearn.cluster import KMeans

    k = prior.num_components
    if len(means) < k:
        raise ValueError(f"at least {k} codes for {k} components expected, got {len(means)}")
    if not (means.isfinite().all() and variances.isfinite().all()):
        raise ValueError("finite codes expected: the warm-up has diverged")
    kmeans = KMeans(k, n_init=10, random_state=seed).fit(means.cpu().double().numpy())
    labels = torch.as_tensor(kmeans.labels_, dtype=torch.int64, device=means.device)
    centres = torch.as_tensor(kmeans.cluster_centers_).to(means)
    member = F.one_hot(labels, k).to(means)  # (n, K)
    counts = member.sum(0).clamp(min=1.0)
    spread = member.T @ ((means - centres[labels]) ** 2 + variances) / counts.unsqueeze(-1)
    prior.initialize_(centres, spread.clamp(min=variance_floor), counts)
