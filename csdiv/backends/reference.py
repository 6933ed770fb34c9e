"""The reference as a backend, and the description of what every backend offers.

Tensors come as ``*_means`` (*batch, K, D), ``*_variances`` (*batch, K or 1, D or 1) and ``*_log_weights`` (*batch, K)
or None (uniform), of one dtype (float32 or float64) and device, on any strides; their batch dimensions broadcast.

A logarithm comes in two parts, ``value`` and ``offset`` (float64): their sum is the logarithm. A backend moves what
cancels in D_CS, the scale of log c and constants, to the offset, where it is not rounded to float32.

``needs`` says which of the tensors, in the order of the arguments, want a gradient; just those are returned, in the
shape of the tensor. A forward function that takes ``needs`` returns gradients last, those of the sum of its values;
where the values are scalars, every tensor that wants one must have all batch dimensions. Other gradients, and those
that it was not asked for, are given by its backward function.

Functions named ``full_…`` take ``*_covariances`` (*batch, K or 1, D, D) instead, symmetric, with D up to
``csdiv.backends.MAX_FULL_DIM``, and weights that are always given; all is float64, and values are whole. "reference"
and those of ``csdiv.backends.FULL`` have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import reference
from csdiv.reference import Components

Tensors = Sequence[Any]
"""Tensors in the order of the arguments, None for weights that were not given."""


def overlap_lse_forward(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j): value (*batch, N) and offset (*batch, 1); gradients of Σ ℓ."""
    tensors = (p_means, p_variances, q_means, q_variances, q_log_weights)
    rows = overlap_lse(*tensors)
    grads = _gradients(overlap_lse, tensors, torch.ones_like(rows), needs)
    return rows, rows.new_zeros(*rows.shape[:-1], 1, dtype=torch.float64), grads


def overlap_lse_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ_i grad_i ℓ_i; equations (5). ``saved`` is the forward's value and offset."""
    return _gradients(overlap_lse, tensors, grad, needs)


def log_overlap_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """log V(p, q): value and offset, both (*batch,) float64; the rows (*batch, N), for the backward pass; gradients."""
    p, q = Components(p_means, p_variances, None, p_log_weights), Components(q_means, q_variances, None, q_log_weights)
    value = reference.log_overlap(p, q)
    tensors = (p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights)
    grads = _gradients(log_overlap, tensors, torch.ones_like(value), needs)
    return value.double(), torch.zeros_like(value, dtype=torch.float64), reference.overlap_lse(p, q), grads


def log_overlap_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ grad · log V(p, q). ``saved`` is the forward's value and rows."""
    return _gradients(log_overlap, tensors, grad.to(tensors[0].dtype), needs)


def self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """log V(p, p): value and offset, both (*batch,) float64; gradients."""
    tensors = (means, variances, log_weights)
    value = self_overlap(*tensors)
    grads = _gradients(self_overlap, tensors, torch.ones_like(value), needs)
    return value.double(), torch.zeros_like(value, dtype=torch.float64), grads


def self_overlap_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ grad · log V(p, p); equation (6)."""
    return _gradients(self_overlap, tensors, grad.to(tensors[0].dtype), needs)


def cs_divergence_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """D_CS(p, q) (*batch,); what the backward pass wants back: the rows of pq (*batch, N) and log V(p, q), log V(p, p)
    and log V(q, q), (*batch, 3) float64; gradients."""
    p, q = Components(p_means, p_variances, None, p_log_weights), Components(q_means, q_variances, None, q_log_weights)
    overlaps = (reference.log_overlap(*pair) for pair in ((p, q), (p, p), (q, q)))
    pq, pp, qq = torch.broadcast_tensors(*overlaps)
    value = 0.5 * (pp + qq) - pq
    tensors = (p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights)
    grads = _gradients(cs_divergence, tensors, torch.ones_like(value), needs)
    return value, reference.overlap_lse(p, q), torch.stack((pq, pp, qq), -1).double(), grads


def cs_divergence_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ grad · D_CS(p, q). ``saved`` is the forward's rows and log overlaps."""
    return _gradients(cs_divergence, tensors, grad, needs)


def pairwise_forward(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j), (*batch, N, M)."""
    return pairwise(p_means, p_variances, q_means, q_variances)


def pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ_ij grad_ij log N(μ_i; ν_j, S_i + T_j)."""
    return _gradients(pairwise, tensors, grad, needs)


def assign(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    """argmax_j of log b_j + log N(μ_i; ν_j, S_i + T_j), (*batch, N) int64; the lowest j of equal ones."""
    q = Components(q_means, q_variances, None, q_log_weights)
    return reference.assign(Components(p_means, p_variances), q)


def full_overlap_lse_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    """ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j), (*batch, N); NaN where a sum is not positive definite."""
    return full_overlap_lse(p_means, p_covariances, q_means, q_covariances, q_log_weights)


def full_overlap_lse_backward(grad: Tensor, tensors: Tensors, rows: Tensor, needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ_i grad_i ℓ_i; equations (5) and (7). ``rows`` are the forward's values."""
    return _gradients(full_overlap_lse, tensors, grad, needs)


def full_self_overlap_forward(means: Tensor, covariances: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """log V(p, p), (*batch,), and (*batch, N) for the backward pass."""
    p = Components(means, None, covariances, log_weights)
    return full_self_overlap(means, covariances, log_weights), reference.overlap_lse(p, p)


def full_self_overlap_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """Gradients of Σ grad · log V(p, p); equation (6). ``saved`` is what the forward gave."""
    return _gradients(full_self_overlap, tensors, grad, needs)


def full_pairwise_forward(p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j), (*batch, N, M)."""
    return full_pairwise(p_means, p_covariances, q_means, q_covariances)


def full_pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    """Gradients of Σ_ij grad_ij log N(μ_i; ν_j, S_i + T_j)."""
    return _gradients(full_pairwise, tensors, grad, needs)


def full_assign(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    """argmax_j of log b_j + log N(μ_i; ν_j, S_i + T_j), (*batch, N) int64; the lowest j of equal ones."""
    q = Components(q_means, None, q_covariances, q_log_weights)
    return reference.assign(Components(p_means, None, p_covariances), q)


# The same quantities as one differentiable function of the tensors: for gradients here, for double backward and
# forward-mode differentiation everywhere.


def overlap_lse(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    q = Components(q_means, q_variances, None, q_log_weights)
    return reference.overlap_lse(Components(p_means, p_variances), q)


def log_overlap(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
) -> Tensor:
    p, q = Components(p_means, p_variances, None, p_log_weights), Components(q_means, q_variances, None, q_log_weights)
    return reference.log_overlap(p, q)


def self_overlap(means: Tensor, variances: Tensor, log_weights: Tensor | None) -> Tensor:
    p = Components(means, variances, None, log_weights)
    return reference.log_overlap(p, p)


def cs_divergence(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
) -> Tensor:
    p, q = Components(p_means, p_variances, None, p_log_weights), Components(q_means, q_variances, None, q_log_weights)
    return reference.cs_divergence(p, q)


def pairwise(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    return reference.pairwise_log_overlap(Components(p_means, p_variances), Components(q_means, q_variances))


def channel_overlap(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    p_log_weights: Tensor,
    q_log_weights: Tensor,
) -> Tensor:
    p, q = Components(p_means, p_variances, None, p_log_weights), Components(q_means, q_variances, None, q_log_weights)
    return reference.channel_overlap(p, q)


def full_channel_overlap(
    p_means: Tensor,
    p_covariances: Tensor,
    q_means: Tensor,
    q_covariances: Tensor,
    p_log_weights: Tensor,
    q_log_weights: Tensor,
) -> Tensor:
    p, q = (
        Components(p_means, None, p_covariances, p_log_weights),
        Components(q_means, None, q_covariances, q_log_weights),
    )
    return reference.channel_overlap(p, q)


def full_overlap_lse(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    q = Components(q_means, None, q_covariances, q_log_weights)
    return reference.overlap_lse(Components(p_means, None, p_covariances), q)


def full_self_overlap(means: Tensor, covariances: Tensor, log_weights: Tensor) -> Tensor:
    p = Components(means, None, covariances, log_weights)
    return reference.log_overlap(p, p)


def full_pairwise(p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor) -> Tensor:
    p, q = Components(p_means, None, p_covariances), Components(q_means, None, q_covariances)
    return reference.pairwise_log_overlap(p, q)


def _gradients(function: Callable[..., Tensor], tensors: Tensors, grad: Tensor, needs: list[bool]) -> list[Tensor]:
    if not any(needs):
        return []
    # Below a TorchDispatchMode autograd is excluded from dispatch: it is wanted here all the same.
    key, include = torch._C.DispatchKey, torch._C._SetExcludeDispatchKeyGuard
    with torch.enable_grad(), include(key.AutogradFunctionality, False), include(key.ADInplaceOrView, False):
        leaves = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
        ]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        return [g.contiguous() for g in torch.autograd.grad(function(*leaves), wanted, grad)]
