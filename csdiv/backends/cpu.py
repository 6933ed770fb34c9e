"""The C++ kernels on CPU tensors: torch tensors in, pointers to csdiv._C, torch tensors out.

Offers the functions of :mod:`csdiv.backends.reference`, where they are described. The kernels take contiguous float32
or float64 arrays of full shape, (batch, K, D); structure and strides are resolved here, in O((N + M) D) memory.
Their logarithms are relative to 2^E, E an even integer for each mixture taken from the size of its variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import csdiv._C as _C
from csdiv.backends.reference import Tensors

_LOG_2PI = math.log(2.0 * math.pi)
_LOG_2 = math.log(2.0)


class _Side(NamedTuple):
    """One side as the kernels read it; the tensors are held so that their memory outlives the call."""

    means: Tensor  # (*own batch, K, D) contiguous
    variances: Tensor  # (*own batch, K, D) contiguous
    log_weights: Tensor | None  # (*own batch, K) contiguous; None: zeros
    exponent: Tensor  # (*own batch,) int64
    own: torch.Size

    def log_uniform(self, log_weights: Tensor | None) -> float:
        """What the kernels leave out where no weights are given: −log K."""
        return -math.log(self.means.shape[-2]) if log_weights is None else 0.0


def _side(means: Tensor, variances: Tensor, log_weights: Tensor | None = None) -> _Side:
    k, d = means.shape[-2:]
    own = _own_batch(means, variances, log_weights)
    means, variances = _filled(means, (*own, k, d)), _filled(variances, (*own, k, d))
    if log_weights is not None:
        log_weights = _filled(log_weights, (*own, k))
    exponent = torch.empty(own, dtype=torch.int64)
    _C.cpu_scale_exponents(means.itemsize, d, variances.data_ptr(), own.numel(), k, exponent.data_ptr())
    return _Side(means, variances, log_weights, exponent, own)


def _filled(t: Tensor, shape: tuple[int, ...]) -> Tensor:
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
        self.n, self.m, self.dim = p.means.shape[-2], q.means.shape[-2], p.means.shape[-1]
        self._indices = [_batch_index(side.own, self.batch) for side in (p, q)]
        self.itemsize = p.means.itemsize

    def arguments(self) -> tuple[object, ...]:
        return (self.itemsize, self.batch.numel(), self.dim, *map(_pointers, (self.p, self.q), self._indices))

    def offset(self) -> Tensor:
        """(*batch,) float64: what the kernels leave out of log N, in nats."""
        exponent = (self.p.exponent + self.q.exponent).to(torch.float64).expand(self.batch)
        return -0.5 * (0.5 * _LOG_2 * exponent + self.dim * _LOG_2PI)

    def new(self, *shape: int) -> Tensor:
        return self.p.means.new_empty((*self.batch, *shape))


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
        side.exponent.data_ptr(),
        0 if index is None else index.data_ptr(),
        side.own.numel(),
        side.means.shape[-2],
    )


class _Gradients:
    """Gradient arrays of one side, allocated where wanted and summed to the shape of the tensors."""

    def __init__(self, side: _Side, tensors: Tensors, needs: Sequence[bool]) -> None:
        full = (side.means.shape, side.variances.shape, side.means.shape[:-1])
        self._tensors = tensors
        self._arrays = [side.means.new_empty(f) if need else None for f, need in zip(full, needs, strict=False)]

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
    rows = pair.new(pair.n)
    _C.cpu_overlap_lse_forward(*pair.arguments(), rows.data_ptr(), torch.get_num_threads())
    return rows, (pair.offset() + pair.q.log_uniform(q_log_weights)).unsqueeze(-1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    pair = _Pair(_side(p_means, p_variances, p_log_weights), _side(q_means, q_variances, q_log_weights))
    rows = pair.new(pair.n)
    value = rows.new_empty(pair.batch, dtype=torch.float64)
    _C.cpu_log_overlap_forward(*pair.arguments(), rows.data_ptr(), value.data_ptr(), torch.get_num_threads())
    return value, pair.offset() + pair.p.log_uniform(p_log_weights) + pair.q.log_uniform(q_log_weights), rows


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


def self_overlap_forward(means: Tensor, variances: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    p = _side(means, variances, log_weights)
    value = p.means.new_empty(p.own, dtype=torch.float64)
    _C.cpu_self_overlap_forward(
        p.means.itemsize, p.means.shape[-1], _pointers(p), value.data_ptr(), torch.get_num_threads()
    )
    return value, _Pair(p, p).offset() + 2.0 * p.log_uniform(log_weights)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Offsets are not needed: −E_pq + ½ E_pp + ½ E_qq = 0, since E_pq = ½ (E_pp + E_qq); constants cancel as well.
    pair = _Pair(_side(p_means, p_variances, p_log_weights), _side(q_means, q_variances, q_log_weights))
    value, rows = pair.new(), pair.new(pair.n)
    pq, pp, qq = (value.new_empty(shape, dtype=torch.float64) for shape in (pair.batch, pair.p.own, pair.q.own))
    saved = (rows, pq, pp, qq)
    _C.cpu_cs_divergence_forward(
        *pair.arguments(), value.data_ptr(), tuple(t.data_ptr() for t in saved), torch.get_num_threads()
    )
    return value, *saved


def cs_divergence_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = _Pair(_side(*tensors[:3]), _side(*tensors[3:]))
    grad_p, grad_q = _Gradients(pair.p, tensors[:3], needs[:3]), _Gradients(pair.q, tensors[3:], needs[3:])
    grad, saved = grad.contiguous(), [t.contiguous() for t in saved]
    _C.cpu_cs_divergence_backward(
        *pair.arguments(),
        grad.data_ptr(),
        tuple(t.data_ptr() for t in saved),
        grad_p.pointers(),
        grad_q.pointers(),
        torch.get_num_threads(),
    )
    return grad_p.results() + grad_q.results()


def pairwise_forward(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    pair = _Pair(_side(p_means, p_variances), _side(q_means, q_variances))
    out = pair.new(pair.n, pair.m)
    _C.cpu_pairwise_forward(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out.add_(pair.offset().to(out.dtype)[..., None, None])


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
    out = pair.new(pair.n).to(torch.int64)
    _C.cpu_assign(*pair.arguments(), out.data_ptr(), torch.get_num_threads())
    return out
