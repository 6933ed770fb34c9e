"""The CUDA C++ kernels on CUDA tensors: torch tensors in, pointers to csdiv._C, torch tensors out.

Offers the functions of :mod:`csdiv.backends.reference`, where they are described. Kernels run on the tensors' device
and torch's current stream there, in scratch memory of torch's allocator; nothing waits for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import csdiv._C as _C
from csdiv import reference
from csdiv.backends.arrays import Gradients, Pair, flattened, make_full_side, make_side, pointers
from csdiv.backends.reference import Tensors

native = _C
"""The module with the functions ``cuda_*``; tests put an emulation in its place."""


def stream(device: torch.device) -> int:
    """The address of torch's current stream on ``device``."""
    return torch.cuda.current_stream(device).cuda_stream


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors: how work is cut depends on it, and so results are the same on one device model."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


loaded = set[torch.device]()
"""Devices that have all kernels, see :func:`csdiv.warmup`: what has not been loaded cannot be captured."""


def _run(function: Callable[..., int], device: torch.device, *arguments: object) -> None:
    """Calls ``function`` twice: for the size of its scratch memory, and with it."""
    if device not in loaded and capturing():
        raise RuntimeError(f"CUDA graph capture on {device}: call csdiv.warmup({str(device)!r}) before it")
    where = (device.index or 0, stream(device), processors(device))
    size = function(*arguments, (*where, 0))
    scratch = torch.empty(size, dtype=torch.uint8, device=device)
    if size:
        function(*arguments, (*where, scratch.data_ptr()))


def overlap_lse_forward(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances, q_log_weights))
    rows, flat = pair.new(pair.n), flattened(pair)
    offset = flat.new(1, dtype=torch.float64)
    _run(native.cuda_overlap_lse_forward, rows.device, *flat.arguments(), rows.data_ptr(), offset.data_ptr())
    saved = (rows, offset.expand(*pair.batch, 1).contiguous())
    tensors = (p_means, p_variances, q_means, q_variances, q_log_weights)
    return *saved, overlap_lse_backward(torch.ones_like(rows), tensors, saved, needs) if any(needs) else []


def overlap_lse_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:2]), make_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    value, offset = saved
    rows, grad = (value + offset).contiguous(), grad.contiguous()  # float64: nothing is lost
    _run(
        native.cuda_overlap_lse_backward,
        rows.device,
        *flattened(pair).arguments(),
        rows.data_ptr(),
        grad.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
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
    rows, value = pair.new(pair.n), pair.new(dtype=torch.float64)
    _run(
        native.cuda_log_overlap_forward,
        rows.device,
        *pair.arguments(),
        rows.data_ptr(),
        value.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
    )
    return value, torch.zeros_like(value), rows, grad_p.results() + grad_q.results()


def log_overlap_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:3], needs[:3]), Gradients(pair.q, tensors[3:], needs[3:])
    value, grad = saved[0].contiguous(), grad.to(pair.p.means.dtype).contiguous()
    _run(
        native.cuda_log_overlap_backward,
        grad.device,
        *pair.arguments(),
        value.data_ptr(),
        grad.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
    )
    return grad_p.results() + grad_q.results()


def self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    p = make_side(means, variances, log_weights)
    grads = Gradients(p, (means, variances, log_weights), needs)
    value = means.new_empty(p.own, dtype=torch.float64)
    _run(
        native.cuda_self_overlap_forward,
        value.device,
        p.means.itemsize,
        p.means.shape[-1],
        pointers(p),
        value.data_ptr(),
        grads.pointers(),
    )
    return value, torch.zeros_like(value), grads.results()


def self_overlap_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    p = make_side(*tensors)
    grads = Gradients(p, tensors, needs)
    value, grad = value.contiguous(), grad.to(p.means.dtype).contiguous()
    _run(
        native.cuda_self_overlap_backward,
        value.device,
        p.means.itemsize,
        p.means.shape[-1],
        pointers(p),
        value.data_ptr(),
        grad.data_ptr(),
        grads.pointers(),
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
    _run(
        native.cuda_cs_divergence_forward,
        value.device,
        *pair.arguments(),
        value.data_ptr(),
        rows.data_ptr(),
        overlaps.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
    )
    return value, rows, overlaps, grad_p.results() + grad_q.results()


def cs_divergence_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:3], needs[:3]), Gradients(pair.q, tensors[3:], needs[3:])
    grad, overlaps = grad.contiguous(), saved[1].contiguous()
    _run(
        native.cuda_cs_divergence_backward,
        grad.device,
        *pair.arguments(),
        grad.data_ptr(),
        overlaps.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
    )
    return grad_p.results() + grad_q.results()


def pairwise_forward(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances))
    out = pair.new(pair.n, pair.m)
    _run(native.cuda_pairwise_forward, out.device, *pair.arguments(), out.data_ptr())
    return out


def pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:2]), make_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    grad = grad.contiguous()
    _run(
        native.cuda_pairwise_backward,
        grad.device,
        *pair.arguments(),
        grad.data_ptr(),
        grad_p.pointers(),
        grad_q.pointers(),
    )
    return grad_p.results() + grad_q.results()


def assign(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances, q_log_weights))
    out = pair.new(pair.n, dtype=torch.int64)
    _run(native.cuda_assign, out.device, *flattened(pair).arguments(), out.data_ptr())
    return out


def full_overlap_lse_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    pair = Pair(make_full_side(p_means, p_covariances), make_full_side(q_means, q_covariances, q_log_weights))
    rows = pair.new(pair.n)
    arguments = flattened(pair).arguments()
    _run(native.cuda_full_overlap_lse_forward, rows.device, *arguments, False, rows.data_ptr())
    return rows


def full_overlap_lse_backward(grad: Tensor, tensors: Tensors, rows: Tensor, needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_full_side(*tensors[:2]), make_full_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    _full_overlap_lse_backward(flattened(pair), rows, grad, grad_p.pointers(), grad_q.pointers())
    return grad_p.results() + grad_q.results()


def _full_overlap_lse_backward(
    pair: Pair, rows: Tensor, grad: Tensor, grad_p: tuple[int, ...], grad_q: tuple[int, ...]
) -> None:
    rows, grad = rows.contiguous(), grad.contiguous()
    addresses = rows.data_ptr(), grad.data_ptr()
    _run(native.cuda_full_overlap_lse_backward, rows.device, *pair.arguments(), *addresses, grad_p, grad_q)


def full_self_overlap_forward(means: Tensor, covariances: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    p = make_full_side(means, covariances, log_weights)
    pair = Pair(p, p)
    rows = pair.new(pair.n)
    _run(native.cuda_full_overlap_lse_forward, rows.device, *pair.arguments(), True, rows.data_ptr())
    weighted = torch.where(log_weights == -math.inf, -math.inf, rows + log_weights)
    return reference.logsumexp(weighted, -1), rows


def full_self_overlap_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """As rows whose own sides alone have gradients, twice: each pair's share of the total, not of its row."""
    p, value = make_full_side(*tensors), saved[0].unsqueeze(-1)
    grads = Gradients(p, tensors, needs)
    rows = value - tensors[2]
    nothing = (tensors[2] == -math.inf) | (value == -math.inf)
    grad_rows = torch.where(nothing, 0.0, 2.0 * grad.unsqueeze(-1))
    _full_overlap_lse_backward(Pair(p, p), rows, grad_rows, grads.pointers(), (0, 0, 0))
    return grads.results()


def full_pairwise_forward(p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor) -> Tensor:
    pair = Pair(make_full_side(p_means, p_covariances), make_full_side(q_means, q_covariances))
    out = pair.new(pair.n, pair.m)
    _run(native.cuda_full_pairwise_forward, out.device, *flattened(pair).arguments(), out.data_ptr())
    return out


def full_pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_full_side(*tensors[:2]), make_full_side(*tensors[2:]))
    grad_p, grad_q = Gradients(pair.p, tensors[:2], needs[:2]), Gradients(pair.q, tensors[2:], needs[2:])
    grad, arguments = grad.contiguous(), flattened(pair).arguments()
    sides = grad_p.pointers(), grad_q.pointers()
    _run(native.cuda_full_pairwise_backward, grad.device, *arguments, grad.data_ptr(), *sides)
    return grad_p.results() + grad_q.results()


def full_assign(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor
) -> Tensor:
    pair = Pair(make_full_side(p_means, p_covariances), make_full_side(q_means, q_covariances, q_log_weights))
    out = pair.new(pair.n, dtype=torch.int64)
    _run(native.cuda_full_assign, out.device, *flattened(pair).arguments(), out.data_ptr())
    return out
