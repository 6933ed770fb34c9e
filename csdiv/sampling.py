"""Draws from mixtures."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csdiv.checks import computing_dtype
from csdiv.covariances import lower_factor

if TYPE_CHECKING:
    from csdiv.mixture import GaussianMixture


def rsample(p: GaussianMixture, n: int) -> Tensor:
    """See :meth:`csdiv.GaussianMixture.rsample`."""
    n = _count(n)
    batch, dtype = p.batch_shape, computing_dtype(p.dtype)
    index = _draw_components(p, n)
    noise = torch.randn(*batch, n, p.dim, dtype=dtype, device=p.device)
    means = _chosen(p.means.to(dtype), index, 1)
    if p.log_weights is not None:
        means = torch.where(p.log_weights.amax(-1).isfinite()[..., None, None], means, math.nan)
    if p.variances is not None:
        return means + _chosen(p.variances.to(dtype), index, 1).sqrt() * noise  # of those drawn: sqrt'(0) is infinite
    factor = (lower_factor(p.map(torch.Tensor.double)) if p.factor is None else p.factor).to(dtype)
    with torch.autocast(p.device.type, enabled=False):
        if factor.shape[-3] == 1:
            return means + noise @ factor.squeeze(-3).mT
        return means + (_chosen(factor, index, 2) @ noise.unsqueeze(-1)).squeeze(-1)


def _count(n: Any) -> int:
    """n as a number of draws.

    Raises:
        TypeError: not an integer. ValueError: negative.
    """
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n: a number of draws expected, got {n!r}; for a shape, reshape the draws") from None
    if count < 0:
        raise ValueError(f"n: a number of draws >= 0 expected, got {count}")
    return count


def _draw_components(p: GaussianMixture, n: int) -> Tensor:
    """Indices of n components, (*batch, n), each with the probability of its weight.

    Cumulative weights are integers, in units of 2⁻⁶² of the total. So their sums are exact: any number of components
    keeps its share, and the order of summation does not matter. A component of weight zero has an empty interval.
    """
    batch, k = p.batch_shape, p.num_components
    if p.log_weights is None:
        return torch.randint(k, (*batch, n), device=p.device)
    log_weights = p.log_weights.detach().double()
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    shares = (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
    ends = (shares * 2.0**62).round().long().cumsum(-1)
    if ends.ndim > 1:
        ends = ends.expand(*batch, k).contiguous()
    total = ends[..., -1:]
    drawn = (torch.rand(*batch, n, dtype=torch.float64, device=p.device) * total).long()
    return torch.searchsorted(ends, torch.minimum(drawn, total - 1), right=True)


def _chosen(parameter: Tensor, index: Tensor, event_dims: int) -> Tensor:
    """The components ``index`` (*batch, n) of a parameter (*batch, K or 1, *event); what all have stays one."""
    axis = -1 - event_dims
    if parameter.shape[axis] == 1:
        return parameter
    event = parameter.shape[axis + 1 :]
    rows = index.view(*index.shape, *[1] * event_dims).expand(*index.shape, *event)
    return parameter.expand(*index.shape[:-1], *parameter.shape[axis:]).gather(axis, rows)
