"""torch.distributions and scikit-learn: what :class:`csdiv.GaussianMixture` is made from and turned into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from csdiv.covariances import lower_factor

if TYPE_CHECKING:
    from torch.distributions import Distribution, MixtureSameFamily

    from csdiv.mixture import GaussianMixture

_SKLEARN_KINDS = ("full", "tied", "diag", "spherical")


def distribution_parameters(distribution: Distribution) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_distribution``."""
    from torch.distributions import MixtureSameFamily

    if isinstance(distribution, MixtureSameFamily):
        logits = distribution.mixture_distribution.logits
        return {"log_weights": logits, **_gaussian_parameters(distribution.component_distribution)}
    one = _gaussian_parameters(distribution)
    ranks = {"scale_tril": 2, "covariance_matrix": 2}  # event dimensions; 1 for the others
    return {name: t.unsqueeze(t.ndim - ranks.get(name, 1)) for name, t in one.items()}


def to_distribution(p: GaussianMixture) -> MixtureSameFamily:
    """See :meth:`csdiv.GaussianMixture.to_distribution`."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

    shape, dtype = (*p.batch_shape, p.num_components), p.dtype
    means = p.means.to(dtype).expand(*shape, p.dim)
    log_weights = means.new_zeros(()) if p.log_weights is None else p.log_weights.to(dtype)
    weights = Categorical(logits=log_weights.expand(shape))
    if p.variances is not None:
        scale = p.variances.to(dtype).sqrt().expand(means.shape)
        return MixtureSameFamily(weights, Independent(Normal(means, scale), 1))
    name = "scale_tril" if p.covariance_matrix is None else "covariance_matrix"
    matrices = lower_factor(p) if p.covariance_matrix is None else p.covariance_matrix
    given: dict[str, Any] = {name: matrices.to(dtype).expand(*means.shape, p.dim)}
    return MixtureSameFamily(weights, MultivariateNormal(means, **given))


def sklearn_parameters(mixture: Any) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_sklearn``."""
    kind = getattr(mixture, "covariance_type", None)
    if kind not in _SKLEARN_KINDS:
        raise TypeError(f"mixture: a sklearn.mixture.GaussianMixture expected, got {type(mixture).__name__}")
    if not hasattr(mixture, "covariances_"):
        raise ValueError("mixture: a fitted one expected, call its fit() before")
    covariance = torch.tensor(mixture.covariances_)
    form = {
        "full": {"covariance_matrix": covariance},
        "tied": {"covariance_matrix": covariance.unsqueeze(0)},
        "diag": {"variances": covariance},
        "spherical": {"variances": covariance.unsqueeze(-1)},
    }
    return {"means": torch.tensor(mixture.means_), "log_weights": torch.tensor(mixture.weights_).log(), **form[kind]}


def to_sklearn(p: GaussianMixture) -> Any:
    """See :meth:`csdiv.GaussianMixture.to_sklearn`."""
    from sklearn.mixture import GaussianMixture as Estimator

    if p.batch_shape:
        raise ValueError(f"one mixture expected, got batch shape {tuple(p.batch_shape)}")
    p = p.detach().to("cpu", p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32)
    k, d = p.num_components, p.dim
    weights = p.means.new_full((k,), 1.0 / k) if p.log_weights is None else p.log_weights.softmax(-1)
    if p.variances is not None:
        kind = "spherical" if p.structure.endswith("spherical") else "diag"
        covariances = p.variances.expand(k, 1).squeeze(-1) if kind == "spherical" else p.variances.expand(k, d)
        if not bool((covariances > 0.0).all()):
            raise ValueError("variances: values > 0 expected by scikit-learn")
        precisions_cholesky = covariances.rsqrt()
        precisions = precisions_cholesky.square()
    else:
        kind = "tied" if p.structure == "tied full" else "full"
        lower = lower_factor(p)
        lower = lower[0] if kind == "tied" else lower
        covariances = lower @ lower.mT
        precisions_cholesky = torch.linalg.solve_triangular(lower.mT, torch.eye(d, dtype=lower.dtype), upper=True)
        precisions = precisions_cholesky @ precisions_cholesky.mT
    estimator = Estimator(k, covariance_type=kind)
    fitted = {"weights_": weights, "means_": p.means, "covariances_": covariances}
    for name, t in (fitted | {"precisions_cholesky_": precisions_cholesky, "precisions_": precisions}).items():
        setattr(estimator, name, t.contiguous().numpy().copy())
    estimator.n_features_in_, estimator.converged_, estimator.n_iter_ = d, True, 0
    return estimator


def _gaussian_parameters(distribution: Distribution) -> dict[str, Any]:
    """means and variances, or means and scale_tril, of a batch of Gaussians with event shape (D,)."""
    from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

    if isinstance(distribution, MultivariateNormal):
        return {"means": distribution.loc, "scale_tril": distribution.scale_tril}
    if isinstance(distribution, LowRankMultivariateNormal):
        return {"means": distribution.loc, "covariance_matrix": distribution.covariance_matrix}
    if isinstance(distribution, Independent) and isinstance(distribution.base_dist, Normal):
        if distribution.reinterpreted_batch_ndims != 1:
            raise ValueError("Independent(Normal, 1) expected, with one event dimension")
        return {"means": distribution.base_dist.loc, "variances": distribution.base_dist.scale**2}
    if isinstance(distribution, Normal):
        if not distribution.batch_shape:
            return {"means": distribution.loc.view(1), "variances": distribution.scale.view(1) ** 2}
        raise ValueError("a Normal with batch dimensions is ambiguous: wrap it in Independent(..., 1)")
    raise TypeError(
        "MixtureSameFamily, Independent(Normal, 1), MultivariateNormal or LowRankMultivariateNormal expected, "
        f"got {type(distribution).__name__}"
    )
