"""The Triton kernels on CUDA tensors: torch tensors in, packed tensors to csdiv.kernels, torch tensors out.

Offers the functions of :mod:`csdiv.backends.reference`, where they are described. Kernels are compiled when they are
first needed, and run on the tensors' device and torch's current stream there; nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv.backends.arrays import Pair, Side, flattened, make_side
from csdiv.backends.reference import Tensors
from csdiv.kernels.assign import launch_assign
from csdiv.kernels.configurations import Shared
from csdiv.kernels.cs_divergence import launch_cs_divergence
from csdiv.kernels.gradient_sweep import Weights, launch_gradient_sweep
from csdiv.kernels.overlap_lse_forward import launch_combine_rows
from csdiv.kernels.pack import Packed, Problem, Scale, launch_pack, launch_scale
from csdiv.kernels.pairwise import launch_pairwise_forward
from csdiv.kernels.row_sums import launch_row_sums
from csdiv.kernels.totals import launch_totals

LOG2_E = 1 / math.log(2)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors: how work is cut depends on it, and so results are the same on one device model."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which kernels are launched on ``device``."""
    return torch.cuda.device(device)


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_current_stream_capturing()


loaded = set[torch.device]()
"""Devices that have kernels, see :func:`csdiv.warmup`: what has not been compiled and loaded cannot be captured."""


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(first: Tensor, *arguments: Any) -> Any:
        if first.device not in loaded and capturing():
            raise RuntimeError(
                f"CUDA graph capture on {first.device}: call csdiv.warmup({str(first.device)!r}) before it"
            )
        with current(first.device):
            return function(first, *arguments)

    return guarded


def _pack(side: Side, scale: Scale, spherical: bool) -> Packed:
    shape = (side.own.numel(), *side.means.shape[-2:])
    means, variances = (t.view(shape) for t in (side.means, side.variances))
    log_weights = None if side.log_weights is None else side.log_weights.view(shape[:-1])
    return launch_pack(means, variances, log_weights, scale, Shared(spherical, side.tied))


def _problem(pair: Pair) -> Problem:
    """The pair as the kernels read it; problems that share a side share the scale."""
    batch = pair.batch.numel()
    variances = [side.variances.view(side.own.numel(), *side.means.shape[-2:]) for side in (pair.p, pair.q)]
    own = pair.p.own.numel() == batch == pair.q.own.numel()
    scale = launch_scale(*variances, batch if own else 1)
    spherical = pair.p.same_dims and pair.q.same_dims  # or the scale differs from dimension to dimension
    p = _pack(pair.p, scale, spherical)
    q = p if pair.q is pair.p else _pack(pair.q, scale, spherical)
    return Problem(p, q, *(_index(pair, k) for k in range(2)), scale, batch, pair.p.means.shape[-1])


def _index(pair: Pair, k: int) -> Tensor | None:
    """The item of a side that each problem uses, None: its own."""
    index, items, batch = pair.indices[k], (pair.p, pair.q)[k].own.numel(), pair.batch.numel()
    if index is None and items != batch:
        return torch.zeros(batch, dtype=torch.int64, device=pair.p.means.device)
    return index


def _values_of_items(values: Tensor, batch: torch.Size, own: torch.Size) -> Tensor:
    """One of the values (batch,) of the problems that use each item of a side."""
    values = values.view(batch)[(0,) * (len(batch) - len(own))]
    for dim, size in enumerate(own):
        values = values.narrow(dim, 0, size)
    return values.reshape(-1)


def _shares_of_totals(problem: Problem, values: Tensor) -> Weights:
    """The share of a pair in the sum over all pairs, whose logarithm is ``values`` (batch,)."""
    log2_weights = problem.p.log2_weights
    if problem.p_index is not None:
        log2_weights = log2_weights[problem.p_index]
    totals = LOG2_E * (values - problem.scale.offsets)
    shares = (log2_weights - totals.unsqueeze(-1)).to(problem.dtype)
    return Weights(shares.where(log2_weights != -math.inf, -math.inf))


def _shares_of_rows(problem: Problem, rows: Tensor, grad: Tensor) -> Weights:
    """The share of a pair in its row, whose logarithm is ``rows`` (batch, n) float64, times the row's gradient."""
    shares = LOG2_E * (problem.scale.offsets.unsqueeze(-1) - rows).where(grad != 0, -math.inf)
    padding = (0, problem.p.padded - problem.p.n)
    shares, factors = (torch.nn.functional.pad(t, padding, value=x) for t, x in ((shares, -math.inf), (grad, 0.0)))
    return Weights(shares.to(problem.dtype), factors.contiguous())


def _times(factors: Tensor, sums: Tensor) -> Tensor:
    """Each of the sums (items, ...) times its factor (items,); zero gives zero."""
    factors = factors.view(-1, *(1,) * (sums.ndim - 1))
    return (factors * sums).where(factors != 0, 0.0)


def _item_sums(
    pair: Pair, problem: Problem, weights: Weights, needs: Sequence[bool], factors: Tensor | None, *, of_p: bool
) -> Tensor:
    """The sums of the items of p, or of q; ``factors`` (batch,) are the gradients of the problems' values."""
    device, own = problem.scale.scales.device, (pair.p if of_p else pair.q).own
    sums = launch_gradient_sweep(problem, weights, processors(device), of_p=of_p, dimensions=any(needs[:2]))
    if factors is not None:
        sums = _times(factors, sums)
    return (
        sums.view(*pair.batch, *sums.shape[1:]).sum_to_size(*own, *sums.shape[1:]).reshape(own.numel(), *sums.shape[1:])
    )


def _self_sums(problem: Problem, values: Tensor, needs: Sequence[bool]) -> Tensor:
    """Equation (6): each item of a side with itself, whose logarithms are ``values`` (items,)."""
    weights = _shares_of_totals(problem, values)
    device = problem.scale.scales.device
    return 2 * launch_gradient_sweep(problem, weights, processors(device), of_p=False, dimensions=any(needs[:2]))


def _gradients(sums: Tensor, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """What is wanted of a side's sums (items, 2 padded dim + 1, padded n), in the shape of its tensors."""
    side = make_side(*tensors)
    n, dim = side.means.shape[-2:]
    padded = sums.shape[1] // 2
    sums = sums[..., : side.own.numel() * n // max(len(sums), 1)]  # of several items where they were flattened
    means, variances = (sums[:, begin : begin + dim].mT for begin in (0, padded))
    gradients = []
    for grad, t, need in zip((means, 0.5 * variances, sums[:, -1]), tensors, needs, strict=False):
        if need:
            grad = grad.reshape(*side.own, n, *grad.shape[2:]).sum_to_size(t.shape)
            gradients.append(grad.to(t.dtype).contiguous())
    return gradients


def _pair_gradients(
    pair: Pair,
    problem: Problem,
    weights: Weights,
    sides: Sequence[tuple[Tensors, Sequence[bool]]],
    factors: Tensor | None = None,
) -> list[Tensor]:
    """Of both sides of a pair, those that are wanted."""
    gradients = []
    for of_p, (tensors, needs) in zip((True, False), sides, strict=True):
        if any(needs):
            gradients += _gradients(_item_sums(pair, problem, weights, needs, factors, of_p=of_p), tensors, needs)
    return gradients


@_on_device
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
    problem = _problem(flat)
    launch_combine_rows(launch_row_sums(problem, processors(rows.device)), rows)
    offsets = problem.scale.offsets
    offset = (offsets if len(offsets) == 1 else offsets.view(pair.batch).unsqueeze(-1)).expand(*pair.batch, 1)
    saved = (rows, offset.contiguous())
    tensors = (p_means, p_variances, q_means, q_variances, q_log_weights)
    return *saved, overlap_lse_backward(torch.ones_like(rows), tensors, saved, needs) if any(needs) else []


@_on_device
def overlap_lse_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = flattened(Pair(make_side(*tensors[:2]), make_side(*tensors[2:])))
    problem = _problem(pair)
    value, offset = saved
    rows, grad = (t.reshape(problem.batch, pair.n) for t in (value + offset, grad))  # float64: nothing is lost
    weights = _shares_of_rows(problem, rows, grad)
    return _pair_gradients(pair, problem, weights, ((tensors[:2], needs[:2]), (tensors[2:], needs[2:])))


@_on_device
def log_overlap_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors = (p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights)
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    problem = _problem(pair)
    value, rows = pair.new(dtype=torch.float64), pair.new(pair.n)
    launch_totals(problem, launch_row_sums(problem, processors(rows.device)), value, rows)
    return value, torch.zeros_like(value), rows, _log_overlap_gradients(pair, problem, None, tensors, value, needs)


@_on_device
def log_overlap_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    return _log_overlap_gradients(pair, _problem(pair), grad.reshape(-1), tensors, saved[0], needs)


def _log_overlap_gradients(
    pair: Pair, problem: Problem, grad: Tensor | None, tensors: Tensors, value: Tensor, needs: list[bool]
) -> list[Tensor]:
    if not any(needs):
        return []
    weights = _shares_of_totals(problem, value.reshape(-1))
    return _pair_gradients(pair, problem, weights, ((tensors[:3], needs[:3]), (tensors[3:], needs[3:])), grad)


@_on_device
def self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tensors = (means, variances, log_weights)
    problem, own = _self_problem(tensors)
    value = means.new_empty(own, dtype=torch.float64)
    partials = launch_row_sums(problem, processors(value.device), self_overlap=True)
    launch_totals(problem, partials, value, None)
    grads = _gradients(_self_sums(problem, value.view(-1), needs), tensors, needs) if any(needs) else []
    return value, torch.zeros_like(value), grads


@_on_device
def self_overlap_backward(grad: Tensor, tensors: Tensors, value: Tensor, needs: list[bool]) -> list[Tensor]:
    sums = _self_sums(_self_problem(tensors)[0], value.reshape(-1), needs)
    return _gradients(_times(grad.reshape(-1), sums), tensors, needs)


def _self_problem(tensors: Tensors) -> tuple[Problem, torch.Size]:
    side = make_side(*tensors)
    return _problem(Pair(side, side)), side.own


@_on_device
def cs_divergence_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    tensors = (p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights)
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    problem = _problem(pair)
    value, rows, overlaps = pair.new(), pair.new(pair.n), pair.new(3, dtype=torch.float64)
    multiprocessors = processors(value.device)
    partials = (
        launch_row_sums(problem, multiprocessors),
        launch_row_sums(problem.with_itself(problem.p), multiprocessors, self_overlap=True),
        launch_row_sums(problem.with_itself(problem.q), multiprocessors, self_overlap=True),
    )
    launch_cs_divergence(problem, partials, value, rows, overlaps)
    grads = _cs_divergence_gradients(pair, problem, torch.ones_like(value), tensors, overlaps, needs)
    return value, rows, overlaps, grads


@_on_device
def cs_divergence_backward(grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:3]), make_side(*tensors[3:]))
    return _cs_divergence_gradients(pair, _problem(pair), grad, tensors, saved[1], needs)


def _cs_divergence_gradients(
    pair: Pair, problem: Problem, grad: Tensor, tensors: Tensors, overlaps: Tensor, needs: list[bool]
) -> list[Tensor]:
    pq, *own_overlaps = overlaps.reshape(-1, 3).unbind(-1)
    grad = grad.double().reshape(pair.batch)
    gradients = []
    sides = ((pair.p, problem.p, tensors[:3], needs[:3]), (pair.q, problem.q, tensors[3:], needs[3:]))
    for (side, packed, side_tensors, side_needs), own_overlap in zip(sides, own_overlaps, strict=True):
        if not any(side_needs):
            continue
        weights, of_p = _shares_of_totals(problem, pq), packed is problem.p
        sums = -_item_sums(pair, problem, weights, side_needs, grad.reshape(-1), of_p=of_p)
        if problem.batch:
            values = _values_of_items(own_overlap, pair.batch, side.own)
            own_sums = _self_sums(problem.with_itself(packed), values, side_needs)
            sums += _times(0.5 * grad.sum_to_size(side.own).reshape(-1), own_sums)
        gradients += _gradients(sums, side_tensors, side_needs)
    return gradients


@_on_device
def pairwise_forward(p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances))
    out = pair.new(pair.n, pair.m)
    launch_pairwise_forward(_problem(pair), out)
    return out


@_on_device
def pairwise_backward(grad: Tensor, tensors: Tensors, needs: list[bool]) -> list[Tensor]:
    pair = Pair(make_side(*tensors[:2]), make_side(*tensors[2:]))
    weights = Weights(given=grad.contiguous())
    return _pair_gradients(pair, _problem(pair), weights, ((tensors[:2], needs[:2]), (tensors[2:], needs[2:])))


@_on_device
def assign(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, q_log_weights: Tensor | None
) -> Tensor:
    pair = Pair(make_side(p_means, p_variances), make_side(q_means, q_variances, q_log_weights))
    flat = flattened(pair)
    return launch_assign(_problem(flat), processors(p_means.device)).view(*pair.batch, pair.n)
