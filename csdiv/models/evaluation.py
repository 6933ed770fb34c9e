"""Scores of a trained autoencoder: likelihood, clustering, and what the divergence costs."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from csdiv import GaussianMixture, pairwise_log_overlap
from csdiv.models.autoencoder import Autoencoder
from csdiv.models.data import Dataset, binarize
from csdiv.models.likelihood import Likelihood, importance_sampled_nll
from csdiv.models.networks import BernoulliDecoder

TRAIN_SEED, VALIDATION_SEED, TEST_SEED = 1, 2, 3  # of the fixed binarisations


def merge_components(mixture: GaussianMixture, num_groups: int) -> Tensor:
    """Groups the components of a mixture by their overlaps, without labels.

    The two groups of least Cauchy–Schwarz divergence, −log V_ab + ½ log V_aa + ½ log V_bb, are merged until
    ``num_groups`` remain; V_ab sums the weighted overlaps of a's components with b's.

    Returns:
        (K,) int64, the group 0 … num_groups − 1 of each component.

    Raises:
        ValueError: num_groups is not between 1 and K.
    """
    k = mixture.num_components
    if not 1 <= num_groups <= k:
        raise ValueError(f"num_groups: between 1 and {k} expected, got {num_groups}")
    mixture = mixture.detach().to("cpu", torch.float64)
    overlap = pairwise_log_overlap(mixture, mixture)
    if mixture.log_weights is not None:
        overlap = overlap + mixture.log_weights.unsqueeze(-1) + mixture.log_weights
    own, group, alive = overlap.diagonal().clone(), torch.arange(k), torch.ones(k, dtype=torch.bool)

    def divergences(rows: Tensor) -> Tensor:
        """From these groups to all others; +inf to themselves and to groups that are gone or have no weight."""
        found = 0.5 * (own[rows].unsqueeze(-1) + own) - overlap[rows]
        found[:, ~alive] = math.inf
        found[torch.arange(len(rows)), rows] = math.inf
        return found.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)

    least, nearest = divergences(group).min(-1)  # of each group, so that most merges take O(K)
    for _ in range(k - num_groups):
        a, b = sorted((int(least.argmin()), int(nearest[least.argmin()])))
        if least.amin() == math.inf:  # nothing but components without weight is left to merge
            a, b = (int(row) for row in alive.nonzero()[:2])
        row = torch.logaddexp(overlap[a], overlap[b])
        row[a] = torch.logaddexp(row[a], row[b])
        overlap[a], overlap[:, a], own[a] = row, row, row[a]
        group[group == b] = a
        alive[b] = False
        least[b] = math.inf
        (distances,) = divergences(torch.tensor([a]))
        outdated = alive & ((nearest == a) | (nearest == b)) & (distances > least)
        outdated[a] = True
        closer = distances <= least
        least[closer], nearest[closer] = distances[closer], a
        rows = outdated.nonzero().squeeze(-1)
        least[rows], nearest[rows] = divergences(rows).min(-1)
    return torch.unique(group, return_inverse=True)[1]


def match_clusters(
    clusters: Tensor, labels: Tensor, num_clusters: int, num_classes: int, *, one_to_one: bool
) -> Tensor:
    """The class that each cluster stands for, by the counts of a labelled set.

    Args:
        clusters, labels: (n,) int64.
        one_to_one: the matching of greatest agreement with each class used once (Hungarian method), clusters and
            classes being equally many; otherwise each cluster's majority class.

    Returns:
        (num_clusters,) int64; −1 for a cluster without a member and without a match.

    Raises:
        ValueError: one_to_one with num_clusters ≠ num_classes.
    """
    counts = torch.bincount(clusters * num_classes + labels, minlength=num_clusters * num_classes)
    counts = counts.view(num_clusters, num_classes)
    if not one_to_one:
        return torch.where(counts.any(-1), counts.argmax(-1), -1)
    if num_clusters != num_classes:
        raise ValueError(f"one-to-one: as many clusters as classes expected, got {num_clusters} and {num_classes}")
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(counts.numpy(), maximize=True)[1])


@dataclass(frozen=True)
class ClusterScores:
    """Agreement of one clustering with the labels of the test split.

    nmi: normalised mutual information, in [0, 1]. ari: adjusted Rand index, at most 1, 0 by chance.
    matching: how a cluster gets its class on the training split, "many-to-one" or "one-to-one".
    accuracy: of these classes, in [0, 1].
    """

    name: str
    num_clusters: int
    nmi: float
    ari: float
    matching: str
    accuracy: float


@dataclass(frozen=True)
class Clustering:
    """Hard assignment of the test codes to the prior's components, (n,) int64, and its scores.

    ``effective_components`` is exp(entropy) of the frequencies of assignment on the training split; ``active_units``
    the number of code dimensions that the data move. Without labels there are no scores.
    """

    components: Tensor
    effective_components: float
    active_units: int
    scores: tuple[ClusterScores, ...]


def effective_number(assignment: Tensor) -> float:
    """exp(entropy) of the frequencies of the values of (n,) int64: how many are used, if all were used alike."""
    frequency = torch.bincount(assignment).double() / len(assignment)
    return torch.special.entr(frequency).sum().exp().item()


def active_units(means: Tensor) -> int:
    """Dimensions of the code means (n, D) with a variance over the data above 0.01.

    Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", ICLR 2016.
    """
    return int((means.var(0, correction=0) > 0.01).sum())


@torch.no_grad()
def variance_ratio(codes: GaussianMixture, prior: GaussianMixture) -> float:
    """Median over codes and dimensions of s/v, of a code's variance to that of the component it is assigned to.

    Near 1 the codes are as wide as their components: posterior collapse.
    """
    assert codes.variances is not None
    assert prior.variances is not None
    return (codes.variances / prior.variances.expand_as(prior.means)[prior.assign(codes)]).median().item()


def cluster(model: Autoencoder, data: Dataset, train_x: Tensor, test_x: Tensor) -> Clustering:
    """Assigns codes q(z|x) to the prior's K components, and to groups of them if K exceeds the number of classes.

    Args:
        train_x, test_x: (n, P) the samples of the two splits as the encoder sees them.
    """
    prior, classes = model.prior_mixture().detach(), data.num_classes
    k, train_codes = prior.num_components, model.encode(train_x)
    train, test = prior.assign(train_codes).cpu(), prior.assign(model.encode(test_x)).cpu()
    scores = []
    if classes and k > 1:
        scores.append(score_clusters("components", train, test, k, data))
        if k > classes:
            group = merge_components(prior, classes)
            scores.append(score_clusters("components merged by overlap", group[train], group[test], classes, data))
    return Clustering(test, effective_number(train), active_units(train_codes.means), tuple(scores))


def score_clusters(name: str, train: Tensor, test: Tensor, num_clusters: int, data: Dataset) -> ClusterScores:
    """Scores of one clustering (n,) int64 of both splits; as many clusters as classes are matched one-to-one."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    assert data.train.labels is not None
    assert data.test.labels is not None
    truth, one_to_one = data.test.labels, num_clusters == data.num_classes
    match = match_clusters(train, data.train.labels, num_clusters, data.num_classes, one_to_one=one_to_one)
    return ClusterScores(
        name,
        num_clusters,
        nmi=float(normalized_mutual_info_score(truth, test)),
        ari=float(adjusted_rand_score(truth, test)),
        matching="one-to-one" if one_to_one else "many-to-one",
        accuracy=(match[test] == truth).double().mean().item(),
    )


@dataclass(frozen=True)
class StepTime:
    """Median wall time of one training step and of the divergence in it, forward and backward, ms."""

    step_ms: float
    divergence_ms: float

    @property
    def share(self) -> float:
        return self.divergence_ms / self.step_ms


def time_divergence(model: Autoencoder, x: Tensor, *, num_steps: int = 50) -> StepTime:
    """Times training steps (forward, backward, Adam) on a copy of the model, and its divergence alone in turn.

    Args:
        x: (B, P) one batch.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    times = []
    for _ in range(num_steps + 3):
        start = _now(x)
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
        middle = _now(x)
        codes = [t.detach().requires_grad_() for t in model.encoder(x)]
        before = _now(x)
        model.divergence(*codes).mean().backward()
        times.append((middle - start, _now(x) - before))
    step, divergence = np.median(times[3:], axis=0) * 1e3
    return StepTime(float(step), float(divergence))


def _now(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


@dataclass(frozen=True)
class Evaluation:
    """Everything that is said about a model on the test split; ``test_x`` is that split as the encoder sees it."""

    test_x: Tensor
    likelihood: Likelihood
    clustering: Clustering
    step_time: StepTime


def evaluate(
    model: Autoencoder,
    data: Dataset,
    *,
    importance_samples: int = 1000,
    likelihood_samples: int = 1000,
    batch_size: int = 128,
) -> Evaluation:
    """The test protocol: fixed binarisation, fixed noise; the same model gives the same scores.

    Args:
        importance_samples: draws of z for each likelihood.
        likelihood_samples: so many test samples, the first, have their likelihood estimated.
        batch_size: of the training step that is timed.
    """
    train_x, test_x = data.train.x, data.test.x
    if isinstance(model.decoder, BernoulliDecoder):
        train_x, test_x = binarize(train_x, TRAIN_SEED), binarize(test_x, TEST_SEED)
    with torch.random.fork_rng():
        torch.manual_seed(TEST_SEED)
        likelihood = importance_sampled_nll(model, test_x[:likelihood_samples], importance_samples)
    clustering = cluster(model, data, train_x, test_x)
    return Evaluation(test_x, likelihood, clustering, time_divergence(model, train_x[:batch_size]))
