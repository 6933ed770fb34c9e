"""The prior's starting point: k-means on the codes of a warmed-up encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from csdiv.nn import GaussianMixturePrior

MAX_PAIRS = 2_000_000  # of codes and centres, up to which k-means takes seconds


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
        seed: of k-means (k-means++, best of 10; on mini-batches where n K exceeds 2 million).

    Raises:
        ValueError: fewer codes than components, or codes that are not finite.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    k = prior.num_components
    if len(means) < k:
        raise ValueError(f"at least {k} codes for {k} components expected, got {len(means)}")
    if not (means.isfinite().all() and variances.isfinite().all()):
        raise ValueError("finite codes expected: the warm-up has diverged")
    if len(means) * k <= MAX_PAIRS:
        kmeans = KMeans(k, n_init=10, random_state=seed)
    else:
        kmeans = MiniBatchKMeans(k, n_init=1, random_state=seed, batch_size=max(1024, 2 * k), reassignment_ratio=0)
    labels = torch.as_tensor(kmeans.fit_predict(means.cpu().double().numpy()), dtype=torch.int64, device=means.device)
    centres = torch.as_tensor(kmeans.cluster_centers_).to(means)
    counts = torch.bincount(labels, minlength=k).to(means)
    # Mini-batches leave centres beside their clusters' means, and may leave clusters empty.
    centres = torch.where(
        counts.unsqueeze(-1) > 0, _sums(means, labels, k) / counts.clamp(min=1.0).unsqueeze(-1), centres
    )
    counts.clamp_(min=1.0)
    spread = _sums((means - centres[labels]) ** 2 + variances, labels, k) / counts.unsqueeze(-1)
    prior.initialize_(centres, spread.clamp(min=variance_floor), counts)


def _sums(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """(K, D) sums of the rows (n, D) with each label."""
    return values.new_zeros(k, values.shape[-1]).index_add_(0, labels, values)
