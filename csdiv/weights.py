"""Linear weights of zero: the derivative of a log overlap with respect to them, which their logarithms do not have.

For w_k = 0 the derivative of log Σ_k w_k v_k is v_k / Σ. It is that of exp(log Σ_k e^θ_k v_k − log Σ) with respect to
θ_k at 0, where k runs over the components of weight zero: a log overlap of these alone, with θ_k = w_k − its value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from csdiv import transforms
from csdiv.mixture import MATRICES, GaussianMixture

_LARGEST = 700.0
"""The largest exponent of which the exponential is finite in float64, about."""


def correction(
    p: GaussianMixture, log_sum: Tensor, overlap: Callable[[GaussianMixture], Tensor], *, channels: bool = False
) -> Tensor | None:
    """Zeros whose gradient is what ``log_sum`` lacks of its derivative with respect to p's weights that are zero.

    Args:
        log_sum: log Σ_k w_k v_k, in any shape.
        overlap: the same as a function of p, whose log weights are those of the components of weight zero.
        channels: whether p's weights are those of channels, (*batch, C, K).

    Returns:
        float64 in the shape of ``log_sum``; None where nothing is missing.
    """
    if (zero := zero_weights(p)) is None:
        return None
    absent = _only(p, zero, channels)
    with torch.enable_grad():
        exponent = overlap(absent).double() - log_sum.detach().double()
        share = torch.where(exponent < _LARGEST, exponent, -math.inf).exp()
        return share - share.detach()


def share_correction(p: GaussianMixture, densities: Tensor, logits: Tensor) -> Tensor | None:
    """Zeros whose gradient is that of w_k N_k / Σ_j w_j N_j to p's weights that are zero, the sum held fixed.

    Args:
        densities: (*batch, N, K) log N_k of each row. logits: the same with the log weights.

    Returns:
        float64 (*batch, N, K); None where nothing is missing.
    """
    if p.weights is None or (zero := zero_weights(p)) is None:
        return None
    exponent = densities.detach().double() - logits.detach().double().logsumexp(-1, keepdim=True)
    factor = torch.where(zero.unsqueeze(-2) & (exponent < _LARGEST), exponent, -math.inf).exp()
    return factor * (p.weights - p.weights.detach()).unsqueeze(-2)


def zero_weights(p: GaussianMixture) -> Tensor | None:
    """Which weights are zero, if any may be and a derivative may be asked for."""
    if p.weights is None:
        return None
    backward = p.weights.requires_grad and torch.is_grad_enabled()
    if not (backward or transforms.transforms_active() or transforms.forward_level() >= 0):
        return None
    zero = p.weights == 0.0
    if p.device.type == "cpu" and transforms.has_values(p.weights) and not bool(zero.any()):
        return None
    return zero


def _only(p: GaussianMixture, zero: Tensor, channels: bool) -> GaussianMixture:
    """The components of weight zero, with log weights of value 0; those with parameters that are not finite are out."""
    assert p.weights is not None
    fixed = p.detach()
    finite = fixed.means.isfinite().all(-1)
    if fixed.variances is not None:
        finite = finite & (fixed.variances.isfinite() & (fixed.variances >= 0.0)).all(-1)
    else:
        assert fixed.matrices is not None
        finite = finite & fixed.matrices.isfinite().all(-1).all(-1)
    finite = finite.unsqueeze(-2) if channels else finite
    log_weights = torch.where(zero & finite, p.weights - p.weights.detach(), -math.inf)
    values = {name: getattr(fixed, name) for name in ("means", "variances", *MATRICES)}
    return GaussianMixture._unchecked(**values, log_weights=log_weights)
