"""Mixtures of every structure, and what they are in torch's terms."""

import pytest
import torch
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor
from torch.distributions import (
    Categorical,
    MixtureSameFamily,
    MultivariateNormal,
)

from csdiv import GaussianMixture, testing

STRUCTURES = [s for s in testing.STRUCTURES if s != "points"]
FIELDS = GaussianMixture.__slots__[:-1]
close = torch.testing.assert_close

on_every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def mixture(structure: str = "diagonal", k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, structure=structure, dtype=torch.float64, **options)


def covariances(p: GaussianMixture) -> Tensor:
    """(K, D, D)."""
    if p.variances is not None:
        return p.variances.expand(p.num_components, p.dim).diag_embed()
    s = p.scale_tril.tril() @ p.scale_tril.tril().mT if p.covariance_matrix is None else p.covariance_matrix
    return s.expand(p.num_components, p.dim, p.dim)


def as_distribution(p: GaussianMixture) -> MixtureSameFamily:
    return MixtureSameFamily(Categorical(logits=p.log_weights), MultivariateNormal(p.means, covariances(p)))


def same(p: GaussianMixture, q: GaussianMixture) -> bool:
    pairs = [(getattr(p, name), getattr(q, name)) for name in FIELDS]
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def fitted_by_sklearn(kind: str, estimator: type = SklearnMixture) -> SklearnMixture:
    data = torch.cat(
        [torch.randn(60, 3, dtype=torch.float64) * s + m for s, m in ((0.5, -1.0), (1.0, 0.5), (0.3, 2.0))]
    )
    return estimator(n_components=3, covariance_type=kind, random_state=0).fit(data.numpy())
