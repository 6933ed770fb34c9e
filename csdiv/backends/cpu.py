"""The C++ kernels on CPU tensors: torch tensors in, pointers to csdiv._C, torch tensors out.

Offers the functions of :mod:`csdiv.backends.reference`, where they are described. The kernels take contiguous float32
or float64 arrays of full shape, (batch, K, D); structure and strides are resolved here, in O((N + M) D) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import csdiv._C as _C
from csdiv.backends.reference import Tensors


class _Side(NamedTuple):
    """One side as the kernels read it; the tensors are held so that their memory outlives the call."""

    means: Tensor  # (*own batch, K, D) contiguous
    variances: Tensor  # (*own batch, K, D) contiguous
    log_weights: Tensor | None  # (*own batch, K) contiguous; None: zeros
    own: torch.Size


def _side(means: Tensor, variances: Tensor, log_weights: Tensor | None = None) -> _Side:
    own = _own_batch(means, variances, log_weights)
    shape = own + means.shape[-2:]
    if log_weights is not None:
        log_weights = _filled(log_weights, shape[:-1])
    return _Side(_filled(means, shape), _filled(variances, shape), log_weights, own)


def _filled(t: Tensor, shape: torch.Size) -> Tensor:
    """``t`` as a contiguous array of the full shape; ``t`` itself if it is one."""
    return t if t.shape == shape and t.is_contiguous() else t.expand(shape).contiguous()


def _own_batch(means: Tensor, variances: Tensor, log_weights: Tensor | None) -> torch.Size:
    own = means.shape[:-2]
    if variances.shape[:-2] == own and (log_weights is None or log_weights.shape[:-1] == own):
        return own
    shapes = [own, variances.shape[:-2]]
    return torch.broadcast_shapes(*shapes, *([] if log_weights is None else [log_weights.shape[:-1]]))


class _Pair:
    """p against q: the arguments that every kernel on a pair shares."""

    def __init__(self, p: _Side, q: _Side) -> None:
        self.p, self.q = p, q
        self.batch = p.own if p.own == q.own else torch.broadcast_shapes(p.own, q.own)
        self.n, self.m = p.means.shape[-2], q.means.shape[-2]
        self._indices = [_batch_index(side.own, self.batch) for side in (p, q)]

    def arguments(self) -> tuple[object, ...]:
        means = self.p.means
        sides = map(_pointers, (self.p, self.q), self._indices)
        return (means.itemsize, self.batch.numel(), means.shape[-1], *sides)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty((*self.batch, *shape), dtype=self.p.means.dtype if dtype is None else dtype)


def _batch_index(own: torch.Size, batch: torch.Size) -> Tensor | None:
    """Which item of a side each problem uses; None where that is plain: its own, or the only one."""
    if own == batch or own.numel() == 1 or own.numel() == batch.numel():
        return None
    return torch.arange(own.numel()).view(own).expand(batch).reshape(-1)


def _pointers(side: _Side, index: Tensor | None = None) -> tuple[int, ...]:
    return (
        side.means.data_ptr(),
        side.variances.data_ptr(),
        0 if side.log_weights is None else side.log_weights.data_ptr(),
        0 if index is None else index.data_ptr(),
        side.own.numel(),
        side.means.shape[-2],
    )


class _Gradients:
    """Gradient arrays of one side, allocated where wanted and summed to the shape of the tensors."""

    def __init__(self, side: _Side, tensors: Tensors, needs: Sequence[bool]) -> None:
        self._tensors = tensors
        self._arrays = [torch.empty_like(side.means) if need else None for need in needs[:2]]
        if len(needs) > 2:
            self._arrays.append(side.means.new_empty(side.means.shape[:-1]) if needs[2] else None)

    def pointers(self) -> tuple[int, ...]:
        """(means, variances, log_weights), 0 where not wanted."""
        pointers = [0 if a is None else a.data_ptr() for a in self._arrays]
        return (*pointers, *(0,) * (3 - len(pointers)))

    def results(self) -> list[Tensor]:
        wanted = [(a, t) for a, t in zip(self._arrays, self._tensors, strict=True) if a is not None]
        return [a if a.shape == t.shape else a.sum_to_size(t.shape) for a, t in wanted]


def overlap_lse_forward(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    pair = _Pair(_side(p_means, p_variances), _side(q_means, q_variances, q_log_weights))
    rows, offset = pair.new(pair.n), pair.new(1, dtype=torch.float64)
    _C.cpu_overlap_lse_forward(*pair.arguments(), rows.data_ptr(), offset.data_ptr(), torch.get_num_threads())
    return rows, offset


def overlap_lse_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    pair = _Pair(_side(*tensors[:2]), _side(*tensors[2:]))
    grad_p, grad_q = _Gradients(pair.p, tensors[:2], needs[:2]), _Gradients(pair.q, tensors[2:], needs[2:])
    rows, grad = value.contiguous(), grad.contiguous()
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
    pair = _Pair(_side(*p), _side(*q))
    grad_p, grad_q = _Gradients(pair.p, p, needs[:3]), _Gradients(pair.q, q, needs[3:])
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
    pair = _Pair(_side(*tensors[:3]), _side(*tensors[3:]))
    grad_p, grad_q = _Gradients(pair.p, tensors[:3], needs[:3]), _Gradients(pair.q, tensors[3:], needs[3:])
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
    p = _side(means, variances, log_weights)
    grads = _Gradients(p, (means, variances, log_weights), needs)
    value, offset = (torch.empty(p.own, dtype=torch.float64) for _ in range(2))
    _C.cpu_self_overlap_forward(
        p.means.itemsize,
        p.means.shape[-1],
        _pointers(p),
        value.data_ptr(),
        offset.data_ptr(),
        grads.pointers(),
        torch.get_num_threads(),
    )
    return value, offset, grads.results()


def self_overlap_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    p = _side(*tensors)
    grads = _Gradients(p, tensors, needs)
    value, grad = value.contiguous(), grad.to(p.means.dtype).contiguous()
    _C.cpu_self_overlap_backward(
        p.means.itemsize,
        p.means.shape[-1],
        _pointers(p),
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
    pair = _Pair(_side(*p), _side(*q))
    grad_p, grad_q = _Gradients(pair.p, p, needs[:3]), _Gradients(pair.q, q, needs[3:])
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
    pair = _Pair(_side(*tensors[:3]), _side(*tensors[3:]))
    grad_p, grad_q = _Gradients(pair.p, tensors[:3], needs[:3]), _Gradients(pair.q, tensors[3:], needs[3:])
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
    pair = _Pair(_side(p_means, p_variances), _side(q_means, q_variances))
    out = pair.new(pair.n, pair.m)
    _C.cpu_pairwise_forward(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out


def pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    pair = _Pair(_side(*tensors[:2]), _side(*tensors[2:]))
    grad_p, grad_q = _Gradients(pair.p, tensors[:2], needs[:2]), _Gradients(pair.q, tensors[2:], needs[2:])
    grad = grad.contiguous()
    _C.cpu_pairwise_backward(
        *pair.arguments(), grad.data_ptr(), grad_p.pointers(), grad_q.pointers(), torch.get_num_threads()
    )
    return grad_p.results() + grad_q.results()


def assign(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    pair = _Pair(_side(p_means, p_variances), _side(q_means, q_variances, q_log_weights))
    out = pair.new(pair.n, dtype=torch.int64)
    _C.cpu_assign(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out
