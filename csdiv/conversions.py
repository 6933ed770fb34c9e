"""torch.distributions, scikit-learn and SciPy: what :class:`csdiv.GaussianMixture` is made from and turned into."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from csdiv.checks import computing_dtype, shares, type_name
from csdiv.covariances import lower_factor, triangular
from csdiv.shapes import broadcast

if TYPE_CHECKING:
    from torch.distributions import Categorical, Distribution, MixtureSameFamily

    from csdiv.mixture import GaussianMixture

_EVENT_DIMS = {"means": 1, "variances": 1, "scale_tril": 2, "covariance_matrix": 2}
_SKLEARN_KINDS = ("full", "tied", "diag", "spherical")


def distribution_parameters(distribution: Distribution) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_distribution``."""
    from torch.distributions import MixtureSameFamily, Normal

    if isinstance(distribution, MixtureSameFamily):
        weights = _weights(distribution.mixture_distribution)
        parameters = _gaussian_parameters(distribution.component_distribution)
    else:
        if isinstance(distribution, Normal) and distribution.batch_shape:
            raise ValueError("a Normal with batch dimensions is ambiguous: wrap it in Independent(..., 1)")
        weights = {}
        one = _gaussian_parameters(distribution)
        parameters = {name: t.unsqueeze(-1 - _EVENT_DIMS[name]) for name, t in one.items()}
    for name, t in parameters.items():
        if name != "means":  # these have all dimensions of the batch
            parameters[name] = _without_leading_ones(t, _EVENT_DIMS[name] + 1)
    return weights | parameters


def to_distribution(p: GaussianMixture) -> MixtureSameFamily:
    """See :meth:`csdiv.GaussianMixture.to_distribution`."""
    from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

    shape, dtype = (*p.batch_shape, p.num_components), computing_dtype(p.dtype)
    means = p.means.to(dtype).expand(*shape, p.dim)
    log_weights = means.new_zeros(()) if p.log_weights is None else p.log_weights.to(dtype)
    weights = Categorical(logits=log_weights.expand(shape))
    if p.variances is not None:
        scale = p.variances.to(dtype).sqrt().expand(means.shape)
        return MixtureSameFamily(weights, Independent(Normal(means, scale), 1))
    factor = lower_factor(p.map(torch.Tensor.double)).to(dtype)
    return MixtureSameFamily(weights, MultivariateNormal(means, scale_tril=factor.expand(*means.shape, p.dim)))


def is_sklearn(value: Any) -> bool:
    """Whether ``value`` is an object that :func:`sklearn_parameters` is for; nothing is imported."""
    kinds = (("mixture", "GaussianMixture"), ("mixture", "BayesianGaussianMixture"), ("neighbors", "KernelDensity"))
    return any(_is(value, f"sklearn.{module}", name) for module, name in kinds)


def is_scipy(value: Any) -> bool:
    """Whether ``value`` is SciPy's gaussian_kde; nothing is imported."""
    return _is(value, "scipy.stats", "gaussian_kde")


def _is(value: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def sklearn_parameters(estimator: Any) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_sklearn``."""
    is_density = _is(estimator, "sklearn.neighbors", "KernelDensity")
    kind: Any = getattr(estimator, "covariance_type", None)
    if not is_density and kind not in _SKLEARN_KINDS:
        raise TypeError(
            "estimator: a GaussianMixture, BayesianGaussianMixture or KernelDensity of scikit-learn expected, "
            f"got {type_name(estimator)}"
        )
    if not hasattr(estimator, "tree_" if is_density else "covariances_"):
        raise ValueError("estimator: a fitted one expected, call its fit() before")
    if is_density:
        return _kernel_density_parameters(estimator)
    covariance = torch.tensor(estimator.covariances_)
    form = {
        "full": {"covariance_matrix": covariance},
        "tied": {"covariance_matrix": covariance.unsqueeze(0)},
        "diag": {"variances": covariance},
        "spherical": {"variances": covariance.unsqueeze(-1)},
    }
    return {"means": torch.tensor(estimator.means_), "weights": torch.tensor(estimator.weights_), **form[kind]}


def _kernel_density_parameters(estimator: Any) -> dict[str, Any]:
    """Of scikit-learn's KernelDensity."""
    if estimator.kernel != "gaussian":
        raise ValueError(f"estimator: the kernel 'gaussian' expected, got {estimator.kernel!r}")
    power = (estimator.metric_params or {}).get("p", 2)
    if not (estimator.metric in ("euclidean", "l2") or (estimator.metric == "minkowski" and power == 2)):
        raise ValueError(f"estimator: the metric 'euclidean' expected, got {estimator.metric!r}")
    samples = torch.tensor(np.asarray(estimator.tree_.data))
    variances = samples.new_full((1, 1), estimator.bandwidth_**2)
    given = estimator.tree_.sample_weight
    weights = {} if given is None else {"weights": shares(torch.tensor(np.asarray(given)))}
    return {"means": samples, "variances": variances, **weights}


def scipy_parameters(density: Any) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_scipy``."""
    if not is_scipy(density):
        raise TypeError(f"density: scipy.stats.gaussian_kde expected, got {type_name(density)}")
    covariance = torch.tensor(density.covariance)
    spread = {"variances": covariance} if density.d == 1 else {"covariance_matrix": covariance.unsqueeze(0)}
    weights = {} if np.ptp(density.weights) == 0.0 else {"weights": torch.tensor(density.weights)}
    return {"means": torch.tensor(density.dataset.T), **spread, **weights}


def to_sklearn(p: GaussianMixture) -> Any:
    """See :meth:`csdiv.GaussianMixture.to_sklearn`."""
    from sklearn.mixture import GaussianMixture as Estimator

    if p.batch_shape:
        raise ValueError(f"one mixture expected, got batch shape {tuple(p.batch_shape)}")
    dtype = computing_dtype(p.dtype)
    p = p.detach().to("cpu", torch.float64)
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
        if not bool(lower.isfinite().all()):
            raise ValueError("covariance_matrix: positive definite expected")
        lower = lower[0] if kind == "tied" else lower
        covariances = lower @ lower.mT
        precisions_cholesky = torch.linalg.solve_triangular(lower.mT, torch.eye(d, dtype=lower.dtype), upper=True)
        precisions = precisions_cholesky @ precisions_cholesky.mT
    estimator = Estimator(k, covariance_type=kind)
    fitted = {"weights_": weights, "means_": p.means, "covariances_": covariances}
    for name, t in (fitted | {"precisions_cholesky_": precisions_cholesky, "precisions_": precisions}).items():
        setattr(estimator, name, t.to(dtype).contiguous().numpy().copy())
    estimator.n_features_in_, estimator.converged_, estimator.n_iter_ = d, True, 0
    estimator.lower_bound_ = -math.inf  # fit() with warm_start starts from it
    return estimator


def _weights(categorical: Categorical) -> dict[str, Tensor]:
    """The weights as they were given: torch clamps the logits that it derives from probabilities at their eps."""
    given = next(name for name in vars(categorical) if name in ("probs", "logits"))  # the other comes later, if at all
    if given == "logits":
        return {"logits": categorical.logits}
    return {"weights": shares(categorical.probs)}


def _gaussian_parameters(distribution: Distribution) -> dict[str, Tensor]:
    """means (*batch, D) and variances, scale_tril or covariance_matrix of a batch of Gaussians, dimensions flattened.

    What is expanded has size 1.
    """
    from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

    base = distribution
    while isinstance(base, Independent):
        base = base.base_dist
    event_dims = len(distribution.event_shape)
    if isinstance(base, Normal):
        variances = _collapsed(base.scale, 0 if _is_expanded(base.scale, event_dims) else event_dims)
        variances = variances.to(computing_dtype(variances.dtype)).square()
        return {"means": _flattened(base.loc, event_dims), "variances": _flattened(variances, event_dims)}
    if isinstance(base, MultivariateNormal) and event_dims == 1:
        given = vars(base)
        is_covariance = "covariance_matrix" in given and not {"scale_tril", "precision_matrix"} & set(given)
        name = "covariance_matrix" if is_covariance else "scale_tril"
        return {"means": base.loc, name: _collapsed(getattr(base, name), 2)}
    if isinstance(base, LowRankMultivariateNormal) and event_dims == 1:
        return {"means": base.loc, "scale_tril": _low_rank_factor(base.cov_factor, base.cov_diag)}
    raise TypeError(
        "MixtureSameFamily, Normal, Independent(Normal, n), MultivariateNormal or LowRankMultivariateNormal expected, "
        f"got {distribution if isinstance(distribution, Independent) else type_name(distribution)}"
    )


def _low_rank_factor(factor: Tensor, diagonal: Tensor) -> Tensor:
    """The Cholesky factor of W Wᵀ + diag(d), which is never formed: it would round d away; in float64."""
    dtype = computing_dtype(factor.dtype)
    factor, diagonal = _collapsed(factor, 2).double(), _collapsed(diagonal, 1).double()
    batch = broadcast(factor.shape[:-2], diagonal.shape[:-1])
    parts = (factor, diagonal.sqrt().diag_embed())
    root = torch.cat([t.expand(*batch, *t.shape[-2:]) for t in parts], -1)
    return triangular(root).to(dtype)


def _collapsed(t: Tensor, event_dims: int) -> Tensor:
    """t with size 1 where it was expanded, but for its last dimensions."""
    for dim in range(t.ndim - event_dims):
        t = t.narrow(dim, 0, 1) if t.stride(dim) == 0 and t.shape[dim] > 1 else t
    return t


def _is_expanded(t: Tensor, event_dims: int) -> bool:
    """Whether t has one value for all of its last dimensions."""
    return all(t.stride(dim) == 0 or t.shape[dim] == 1 for dim in range(t.ndim - event_dims, t.ndim))


def _flattened(t: Tensor, event_dims: int) -> Tensor:
    """(*batch, D) from (*batch, *event)."""
    return t.flatten(-event_dims) if event_dims else t.unsqueeze(-1)


def _without_leading_ones(t: Tensor, ndim: int) -> Tensor:
    while t.ndim > ndim and t.shape[0] == 1:
        t = t.squeeze(0)
    return t
