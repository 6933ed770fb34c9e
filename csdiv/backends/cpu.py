"""The C++ kernels on CPU tensors: torch tensors in, pointers to csdiv._C, torch tensors out.

Offers the functions of :mod:`csdiv.backends.reference`, where they are described.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

import csdiv
import csdiv._C as _C
from csdiv import reference
from csdiv.backends.arrays import Gradients, Pair, make_full_side, make_points, make_side, pointers
from csdiv.backends.reference import Tensors

if os.getpid() == csdiv._PROCESS:
    _C.cpu_share_openmp_threads()


def overlap_lse_forward(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    p, q = (p_means, p_variances), (q_means, q_variances, q_log_weights)
    pair = Pair(make_side(*p), make_side(*q))
    grad_p, grad_q = Gradients(pair.p, p, needs[:2]), Gradients(pair.q, q, needs[2:])
    rows, offset = pair.new(pair.n), pair.new(1, dtype=torch.float64)
    _C.cpu_overlap_lse_forward(
        *pair.arguments(),
        rows.data_ptr(),
        offset.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return rows, offset, grad_p.results() + grad_q.results()


def overlap_lse_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:2]), make_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    rows, grad = saved[0].contiguous(), grad.contiguous()
    _C.cpu_overlap_lse_backward(
        *pair.arguments(),
        rows.data_ptr(),
        grad.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return grad_p.results() + grad_q.results()


def log_overlap_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    p, q = (p_means, p_variances, p_log_weights), (q_means, q_variances, q_log_weights)
    pair = Pair(make_side(*p), make_side(*q))
    grad_p, grad_q = Gradients(pair.p, p, needs[:3]), Gradients(pair.q, q, needs[3:])
    rows, value, offset = pair.new(pair.n), pair.new(dtype=torch.float64), pair.new(dtype=torch.float64)
    _C.cpu_log_overlap_forward(
        *pair.arguments(),
        rows.data_ptr(),
        value.data_ptr(),
        offset.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return value, offset, rows, grad_p.results() + grad_q.results()


def log_overlap_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:3], needs[:3]), Gradients(pair.q, tensors[3:], needs[3:])
    value, rows = (t.contiguous() for t in saved)
    grad = grad.to(rows.dtype).contiguous()
    _C.cpu_log_overlap_backward(
        *pair.arguments(),
        rows.data_ptr(),
        value.data_ptr(),
        grad.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return grad_p.results() + grad_q.results()


def self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    p = make_side(means, variances, log_weights)
    grads = Gradients(p, (means, variances, log_weights), needs)
    value, offset = (torch.empty(p.own, dtype=torch.float64) for _ in range(2))
    _C.cpu_self_overlap_forward(
        p.means.itemsize,
        p.means.shape[-1],
        pointers(p),
        value.data_ptr(),
        offset.data_ptr(),
        grads.pointers(),
        torch.get_num_threads(),
    )
    return value, offset, grads.results()


def self_overlap_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    p = make_side(*tensors)
    grads = Gradients(p, tensors, needs)
    value, grad = value.contiguous(), grad.to(p.means.dtype).contiguous()
    _C.cpu_self_overlap_backward(
        p.means.itemsize,
        p.means.shape[-1],
        pointers(p),
        value.data_ptr(),
        grad.data_ptr(),
        grads.pointers(),
        torch.get_num_threads(),
    )
    return grads.results()


def cs_divergence_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    p, q = (p_means, p_variances, p_log_weights), (q_means, q_variances, q_log_weights)
    pair = Pair(make_side(*p), make_side(*q))
    grad_p, grad_q = Gradients(pair.p, p, needs[:3]), Gradients(pair.q, q, needs[3:])
    value, rows, overlaps = pair.new(), pair.new(pair.n), pair.new(3, dtype=torch.float64)
    _C.cpu_cs_divergence_forward(
        *pair.arguments(),
        value.data_ptr(),
        rows.data_ptr(),
        overlaps.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return value, rows, overlaps, grad_p.results() + grad_q.results()


def cs_divergence_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:3], needs[:3]), Gradients(pair.q, tensors[3:], needs[3:])
    grad, rows, overlaps = (t.contiguous() for t in (grad, *saved))
    _C.cpu_cs_divergence_backward(
        *pair.arguments(),
        grad.data_ptr(),
        rows.data_ptr(),
        overlaps.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return grad_p.results() + grad_q.results()


def pairwise_forward(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances))
    out = pair.new(pair.n, pair.m)
    _C.cpu_pairwise_forward(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out


def pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:2]), make_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    grad = grad.contiguous()
    _C.cpu_pairwise_backward(
        *pair.arguments(), grad.data_ptr(), grad_p.pointers(), grad_q.pointers(), torch.get_num_threads()
    )
    return grad_p.results() + grad_q.results()


def assign(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances, q_log_weights))
    out = pair.new(pair.n, dtype=torch.int64)
    _C.cpu_assign(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out


class _FullPair:
    """A pair with full covariances, its gradients where needed.

    Where p has one covariance for all components they are points to the kernels, and q has the sums, each of which is
    factored once; not where each problem of a batch would need its own sums. ``needs`` is in the order of the tensors.
    """

    def __init__(self, tensors: Tensors, needs: Sequence[bool] = (False,) * 5) -> None:
        self._tensors, self._needs = tensors, needs
        p_means, p_covariances, *q = tensors
        q_batch = torch.broadcast_shapes(*(t.shape[:-event] for t, event in zip(q, (2, 3, 1), strict=False)))
        batch = torch.broadcast_shapes(q_batch, p_covariances.shape[:-3])
        self._points = p_covariances.shape[-3] == 1 and batch == q_batch
        q_needs = list(needs[2 : len(tensors)])
        if self._points:
            q[1] = q[1] + p_covariances
            q_needs[1] |= needs[1]
        self.pair = Pair(make_points(p_means) if self._points else make_full_side(*tensors[:2]), make_full_side(*q))
        p_needs = (needs[0], needs[1] and not self._points)
        self.grad_p = Gradients(self.pair.p, tensors[:2], p_needs)
        self.grad_q = Gradients(self.pair.q, q, q_needs)

    def results(self) -> list[Tensor]:
        grads = self.grad_p.results() + self.grad_q.results()
        if not self._points:
            return grads
        p_means, p_covariances, q_means, q_covariances, *q_log_weights = self._needs
        wanted = (p_means, False, q_means, p_covariances or q_covariances, *q_log_weights)
        found = dict(zip((k for k, need in enumerate(wanted) if need), grads, strict=True))
        if 3 in found:
            found[1] = found[3]  # each covariance has the gradient of the sum
        shapes = [t.shape for t in self._tensors]
        return [found[k].sum_to_size(shapes[k]) for k, need in enumerate(self._needs) if need]


def full_overlap_lse_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    pair = _FullPair((p_means, p_covariances, q_means, q_covariances, q_log_weights)).pair
    rows = pair.new(pair.n)
    _C.cpu_full_overlap_lse_forward(*pair.arguments(), rows.data_ptr(), torch.get_num_threads())
    return rows


def full_overlap_lse_backward(grad: Tensor, tensors: Tensors, rows: Tensor, needs: list[bool]) -> list[Tensor]:
    full = _FullPair(tensors, needs)
    rows, grad = rows.contiguous(), grad.contiguous()
    _C.cpu_full_overlap_lse_backward(
        *full.pair.arguments(),
        rows.data_ptr(),
        grad.data_ptr(),
        full.grad_p.pointers(),
        full.grad_q.pointers(),
        torch.get_num_threads(),
    )
    return full.results()


def full_self_overlap_forward(means: Tensor, covariances: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    p = make_full_side(means, covariances, log_weights)
    rows = means.new_empty(p.means.shape[:-1])
    _C.cpu_full_self_overlap_forward(
        means.itemsize, means.shape[-1], pointers(p), rows.data_ptr(), torch.get_num_threads()
    )
    return reference.logsumexp(_weighted_rows(rows, log_weights), -1), rows


def full_self_overlap_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    p, (value, rows) = make_full_side(*tensors), saved
    grads = Gradients(p, tensors, needs)
    value = value.unsqueeze(-1)
    shares = torch.where(value == -math.inf, 0.0, (_weighted_rows(rows, tensors[2]) - value).exp())
    rows, grad_rows = rows.contiguous(), (grad.unsqueeze(-1) * shares).contiguous()
    _C.cpu_full_self_overlap_backward(
        rows.itemsize,
        p.means.shape[-1],
        pointers(p),
        rows.data_ptr(),
        grad_rows.data_ptr(),
        grads.pointers(),
        torch.get_num_threads(),
    )
    return grads.results()


def _weighted_rows(rows: Tensor, log_weights: Tensor) -> Tensor:
    """log a_i + ℓ_i, −inf for a weight of zero, whatever the row."""
    return torch.where(log_weights == -math.inf, -math.inf, rows + log_weights)


def full_pairwise_forward(p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor) -> Tensor:
    pair = _FullPair((p_means, p_covariances, q_means, q_covariances)).pair
    out = pair.new(pair.n, pair.m)
    _C.cpu_full_pairwise_forward(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out


def full_pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    full = _FullPair(tensors, needs)
    grad = grad.contiguous()
    _C.cpu_full_pairwise_backward(
        *full.pair.arguments(),
        grad.data_ptr(),
        full.grad_p.pointers(),
        full.grad_q.pointers(),
        torch.get_num_threads(),
    )
    return full.results()


def full_assign(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    pair = _FullPair((p_means, p_covariances, q_means, q_covariances, q_log_weights)).pair
    out = pair.new(pair.n, dtype=torch.int64)
    _C.cpu_full_assign(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out
