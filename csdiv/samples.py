"""Kernel density estimates: the parameters of a Gaussian at each sample, and rules for its width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from csdiv.checks import as_bandwidth, as_float_tensor, computing_dtype, exactly_one, shares
from csdiv.shapes import broadcast
from csdiv.transforms import has_values

_MOST_SAMPLES = 1000
"""Of which all distances are taken for their median."""


def density_parameters(x: Any, bandwidth: Any, bandwidth_matrix: Any, weights: Any) -> dict[str, Any]:
    """The arguments of :class:`csdiv.GaussianMixture`; see its ``from_samples``."""
    x = as_float_tensor(x, "x")
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"x: (*batch, n, D) with n and D of at least 1 expected, got {tuple(x.shape)}")
    exactly_one(bandwidth=bandwidth, bandwidth_matrix=bandwidth_matrix)
    parameters = {"means": x}
    if weights is not None:
        weights = as_float_tensor(weights, "weights")
        if weights.ndim < 1 or weights.shape[-1] != x.shape[-2]:
            raise ValueError(f"weights: (*batch, n) with n = {x.shape[-2]} expected, got {tuple(weights.shape)}")
        parameters["weights"] = shares(weights)
    if bandwidth_matrix is not None:
        return parameters | {"covariance_matrix": _matrix(bandwidth_matrix, x)}
    if isinstance(bandwidth, str):
        bandwidth = _by_rule(bandwidth, x, weights)
    bandwidth = as_bandwidth(bandwidth, x)
    if bandwidth.ndim == 1:
        raise ValueError(f"bandwidth: () or (*batch, n or 1, D or 1) expected, got {tuple(bandwidth.shape)}")
    variances = torch.where(bandwidth < 0.0, math.nan, bandwidth).square()
    return parameters | {"variances": variances if bandwidth.ndim else variances.view(1, 1)}


def _matrix(matrix: Any, x: Tensor) -> Tensor:
    """(*batch, 1, D, D)."""
    matrix = as_float_tensor(matrix, "bandwidth_matrix")
    dim = x.shape[-1]
    fits = matrix.ndim >= 2 and matrix.shape[-2:] == (dim, dim) and matrix.ndim <= x.ndim
    if not fits:
        raise ValueError(
            f"bandwidth_matrix: (*batch, D, D), one for all samples, with D = {dim} and the batch of x expected, "
            f"got {tuple(matrix.shape)} for x {tuple(x.shape)}; covariance_matrix of the constructor takes several"
        )
    return matrix.unsqueeze(-3)


def _by_rule(rule: str, x: Tensor, weights: Tensor | None) -> Tensor:
    """Bandwidths (*batch, 1, D or 1) in the dtype computed in, without gradients."""
    if rule not in _RULES:
        raise ValueError(
            f"bandwidth: a number, a tensor or one of {', '.join(map(repr, _RULES))} expected, got {rule!r}"
        )
    if x.shape[-2] < 2:
        raise ValueError(f"bandwidth: at least 2 samples expected for {rule!r}, got 1")
    wide = x.detach().double()
    if weights is None:
        w = wide.new_full(x.shape[-2:-1], 1.0 / x.shape[-2])
    else:
        w = shares(weights.detach().double())
        wide = torch.where((w == 0.0).unsqueeze(-1), 0.0, wide)  # whatever counts nothing may be NaN
    bandwidth = _RULES[rule](wide, w)
    if has_values(x) and x.device.type == "cpu" and bool((bandwidth == 0.0).any()):
        raise ValueError(f"bandwidth: {rule!r} is 0, as the samples do not differ in some dimension, or not at all")
    return bandwidth.to(computing_dtype(x.dtype))


def _scott(x: Tensor, w: Tensor) -> Tensor:
    return _standard_deviations(x, w) * _effective_number(w) ** (-1.0 / (x.shape[-1] + 4))


def _silverman(x: Tensor, w: Tensor) -> Tensor:
    dim = x.shape[-1]
    return _standard_deviations(x, w) * (_effective_number(w) * (dim + 2) / 4.0) ** (-1.0 / (dim + 4))


def _effective_number(w: Tensor) -> Tensor:
    """Of samples: n if all have one weight; (*batch, 1, 1)."""
    return 1.0 / w.square().sum(-1)[..., None, None]


def _standard_deviations(x: Tensor, w: Tensor) -> Tensor:
    """Unbiased for one weight, as SciPy's for several; (*batch, 1, D)."""
    w = w.unsqueeze(-1)
    centred = x - (w * x).sum(-2, keepdim=True)
    biased = (w * centred.square()).sum(-2, keepdim=True)
    return (biased / (1.0 - w.square().sum(-2, keepdim=True))).sqrt()


def _median(x: Tensor, w: Tensor) -> Tensor:
    """σ/√2 for the median σ of distances between two samples, each pair weighted by the product of its weights."""
    n = x.shape[-2]
    batch = broadcast(x.shape[:-2], w.shape[:-1])
    x, w = x.expand(*batch, *x.shape[-2:]), w.expand(*batch, n)
    index = torch.arange(n, device=x.device)
    if n > _MOST_SAMPLES:  # as many at equal distances in their cumulative weight
        at = (torch.arange(_MOST_SAMPLES, dtype=torch.float64, device=x.device) + 0.5) / _MOST_SAMPLES
        ends = w.cumsum(-1)
        at = at.expand(*batch, _MOST_SAMPLES) * ends[..., -1:]
        index = torch.searchsorted(ends, at.contiguous(), right=True).clamp(max=n - 1)
        x = x.gather(-2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
        w = torch.ones_like(at)
    i, j = torch.triu_indices(w.shape[-1], w.shape[-1], 1, device=x.device)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")[..., i, j]
    pairs = torch.where(index[..., i] == index[..., j], 0.0, w[..., i] * w[..., j])
    distances, order = distances.sort(-1)
    cumulative = pairs.gather(-1, order).cumsum(-1)
    middle = torch.searchsorted(cumulative, 0.5 * cumulative[..., -1:].contiguous()).clamp(max=order.shape[-1] - 1)
    return distances.gather(-1, middle).unsqueeze(-1) * math.sqrt(0.5)


_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"scott": _scott, "silverman": _silverman, "median": _median}
