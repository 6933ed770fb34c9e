"""The Triton kernels on CUDA tensors: torch tensors in, packed tensors to csdiv.kernels, torch tensors out.

Kernels are compiled when they are first needed, and run on the tensors' device and torch's current stream there;
nothing waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv.backends.arrays import Call, Problem, Side, flattened, of_own
from csdiv.backends.base import Backend, Tensors
from csdiv.kernels import pack
from csdiv.kernels.assign import launch_assign
from csdiv.kernels.configurations import Shared
from csdiv.kernels.cs_divergence import launch_cs_divergence
from csdiv.kernels.gradient_sweep import Weights, launch_gradient_sweep
from csdiv.kernels.overlap_lse_forward import launch_combine_rows
from csdiv.kernels.pairwise import launch_pairwise_forward
from csdiv.kernels.row_sums import launch_row_sums
from csdiv.kernels.totals import launch_totals
from csdiv.operators import OPERATORS

LOG2_E = 1 / math.log(2)


class Triton(Backend):
    lacks = frozenset(name for name, operator in OPERATORS.items() if operator.others) - Backend.composed

    def processors(self, device: torch.device) -> int:
        """The number of multiprocessors: how work is cut depends on it, so results are the same on one device model."""
        return _processors(device)

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context in which kernels are launched on ``device``."""
        return torch.cuda.device(device)

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def _launching(self, device: torch.device) -> Iterator[int]:
        """Where kernels are launched on ``device``; its number of multiprocessors."""
        if device not in self.loaded and self.capturing():  # what has not been compiled and loaded cannot be captured
            raise RuntimeError(f"CUDA graph capture on {device}: call csdiv.warmup({str(device)!r}) before it")
        with self.current(device):
            yield self.processors(device)

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        with self._launching(tensors[0].device) as processors:
            call = _call(name, tensors)
            outputs, problem = call.outputs(), call.problem
            packed = _packed(flattened(problem) if name == "overlap_lse" else problem)
            if name == "pairwise":
                launch_pairwise_forward(packed, outputs[0])
                return outputs, []
            partials = launch_row_sums(packed, processors, self_overlap=name == "self_overlap")
            if name == "overlap_lse":
                launch_combine_rows(partials, outputs[0])
                offsets = packed.scale.offsets
                offsets = offsets if len(offsets) == 1 else offsets.view(problem.batch).unsqueeze(-1)
                outputs[1] = offsets.expand(*problem.batch, 1).contiguous()
            elif name == "cs_divergence":
                pp, qq = (
                    launch_row_sums(packed.with_itself(side), processors, self_overlap=True)
                    for side in (packed.p, packed.q)
                )
                launch_cs_divergence(packed, (partials, pp, qq), *outputs)
            else:
                launch_totals(packed, partials, outputs[0], outputs[2] if len(outputs) > 2 else None)
                outputs[1].zero_()
            saved = [outputs[k] for k in call.operator.saved]
            return outputs, _gradients(call, packed, processors, None, saved, tensors, needs)

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        with self._launching(tensors[0].device) as processors:
            call = _call(name, tensors)
            packed = _packed(_swept(call))
            return _gradients(call, packed, processors, grad, outputs, tensors, needs)

    def saved_outputs(self, name: str, tensors: Tensors, value: Tensor) -> list[Tensor]:
        return [value, value.new_zeros(1)]

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        with self._launching(tensors[0].device) as processors:
            call = _call(name, tensors)
            problem = call.problem
            return launch_assign(_packed(flattened(problem)), processors).view(*problem.batch, problem.n)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _call(name: str, tensors: Tensors) -> Call:
    return Call(OPERATORS[name], tensors, [False] * len(tensors))


def _swept(call: Call) -> Problem:
    """The problem that gradients are swept over."""
    return flattened(call.problem) if call.operator.name == "overlap_lse" else call.problem


def _packed(problem: Problem) -> pack.Problem:
    """The problem as the kernels read it; problems that share a side share the scale."""
    batch = problem.batch.numel()
    p_variances, q_variances = (
        side.variances.view(side.own.numel(), *side.means.shape[-2:]) for side in (problem.p, problem.q)
    )
    own = problem.p.own.numel() == batch == problem.q.own.numel()
    scale = pack.launch_scale(p_variances, q_variances, batch if own else 1)
    spherical = problem.p.same_dims and problem.q.same_dims  # or the scale differs from dimension to dimension
    p = _packed_side(problem.p, scale, spherical)
    q = p if problem.q is problem.p else _packed_side(problem.q, scale, spherical)
    return pack.Problem(p, q, _index(problem, 0), _index(problem, 1), scale, batch, problem.p.means.shape[-1])


def _packed_side(side: Side, scale: pack.Scale, spherical: bool) -> pack.Packed:
    shape = (side.own.numel(), *side.means.shape[-2:])
    means, variances = (t.view(shape) for t in (side.means, side.variances))
    log_weights = None if side.log_weights is None else side.log_weights.view(shape[:-1])
    return pack.launch_pack(means, variances, log_weights, scale, Shared(spherical, side.tied))


def _index(problem: Problem, k: int) -> Tensor | None:
    """The item of a side that each problem uses, None: its own."""
    index, items, batch = problem.indices[k], (problem.p, problem.q)[k].own.numel(), problem.batch.numel()
    if index is None and items != batch:
        return torch.zeros(batch, dtype=torch.int64, device=problem.p.means.device)
    return index


def _gradients(
    call: Call,
    packed: pack.Problem,
    processors: int,
    grad: Tensor | None,
    outputs: Sequence[Tensor],
    tensors: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of Σ grad · value, None: of the sum of the values. ``outputs`` are the saved ones."""
    if not any(needs):
        return []
    name, swept, own = call.operator.name, _swept(call), len(call.operator.p)
    factors = None
    if name == "cs_divergence":
        grad = torch.ones(call.problem.batch, device=outputs[1].device) if grad is None else grad
        return _cs_divergence_gradients(call, packed, processors, grad, outputs[1], tensors, needs)
    if name == "self_overlap":
        sums = _self_sums(packed, outputs[0].reshape(-1), needs, processors)
        return _of_side(sums if grad is None else _times(grad.reshape(-1), sums), call.problem.p, tensors, needs)
    if name == "pairwise":
        assert grad is not None
        weights = Weights(given=grad.contiguous())
    elif name == "overlap_lse":
        if grad is None:
            raise NotImplementedError('backend "triton": gradients of rows come from the backward pass alone')
        row_lse = outputs[0] + outputs[1]  # float64: nothing is lost
        weights = _shares_of_rows(packed, *(t.reshape(packed.batch, swept.n) for t in (row_lse, grad)))
    else:
        weights = _shares_of_totals(packed, outputs[0].reshape(-1))
        factors = None if grad is None else grad.reshape(-1)
    gradients = []
    sides = ((call.problem.p, tensors[:own], needs[:own]), (call.problem.q, tensors[own:], needs[own:]))
    for of_p, (side, side_tensors, side_needs) in zip((True, False), sides, strict=True):
        if any(side_needs):
            sums = _item_sums(swept, packed, weights, side_needs, factors, processors, of_p=of_p)
            gradients += _of_side(sums, side, side_tensors, side_needs)
    return gradients


def _cs_divergence_gradients(
    call: Call,
    packed: pack.Problem,
    processors: int,
    grad: Tensor,
    overlaps: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = call.problem
    pq, *own_overlaps = overlaps.reshape(-1, 3).unbind(-1)
    grad = grad.double().reshape(problem.batch)
    gradients = []
    sides = ((problem.p, packed.p, tensors[:3], needs[:3]), (problem.q, packed.q, tensors[3:], needs[3:]))
    for (side, packed_side, side_tensors, side_needs), own_overlap in zip(sides, own_overlaps, strict=True):
        if not any(side_needs):
            continue
        weights, of_p = _shares_of_totals(packed, pq), packed_side is packed.p
        sums = -_item_sums(problem, packed, weights, side_needs, grad.reshape(-1), processors, of_p=of_p)
        if packed.batch:
            values = of_own(own_overlap.view(problem.batch), side.own)
            own_sums = _self_sums(packed.with_itself(packed_side), values.reshape(-1), side_needs, processors)
            sums += _times(0.5 * grad.sum_to_size(side.own).reshape(-1), own_sums)
        gradients += _of_side(sums, side, side_tensors, side_needs)
    return gradients


def _shares_of_totals(packed: pack.Problem, values: Tensor) -> Weights:
    """The share of a pair in the sum over all pairs, whose logarithm is ``values`` (batch,)."""
    log2_weights = packed.p.log2_weights
    if packed.p_index is not None:
        log2_weights = log2_weights[packed.p_index]
    totals = LOG2_E * (values - packed.scale.offsets)
    shares = (log2_weights - totals.unsqueeze(-1)).to(packed.dtype)
    return Weights(shares.where(log2_weights != -math.inf, -math.inf))


def _shares_of_rows(packed: pack.Problem, row_lse: Tensor, grad: Tensor) -> Weights:
    """The share of a pair in its row, whose logarithm is ``row_lse`` (batch, n) float64, times the row's gradient."""
    shares = LOG2_E * (packed.scale.offsets.unsqueeze(-1) - row_lse).where(grad != 0, -math.inf)
    padding = (0, packed.p.padded - packed.p.n)
    shares, factors = (torch.nn.functional.pad(t, padding, value=x) for t, x in ((shares, -math.inf), (grad, 0.0)))
    return Weights(shares.to(packed.dtype), factors.contiguous())


def _times(factors: Tensor, sums: Tensor) -> Tensor:
    """Each of the sums (items, ...) times its factor (items,); zero gives zero."""
    factors = factors.view(-1, *(1,) * (sums.ndim - 1))
    return (factors * sums).where(factors != 0, 0.0)


def _item_sums(
    problem: Problem,
    packed: pack.Problem,
    weights: Weights,
    needs: Sequence[bool],
    factors: Tensor | None,
    processors: int,
    *,
    of_p: bool,
) -> Tensor:
    """The sums of the items of p, or of q; ``factors`` (batch,) are the gradients of the problems' values."""
    own = (problem.p if of_p else problem.q).own
    sums = launch_gradient_sweep(packed, weights, processors, of_p=of_p, dimensions=any(needs[:2]))
    if factors is not None:
        sums = _times(factors, sums)
    sizes = sums.shape[1:]
    return sums.view(*problem.batch, *sizes).sum_to_size(*own, *sizes).reshape(own.numel(), *sizes)


def _self_sums(packed: pack.Problem, values: Tensor, needs: Sequence[bool], processors: int) -> Tensor:
    """Equation (6): each item of a side with itself, whose logarithms are ``values`` (items,)."""
    weights = _shares_of_totals(packed, values)
    return 2 * launch_gradient_sweep(packed, weights, processors, of_p=False, dimensions=any(needs[:2]))


def _of_side(sums: Tensor, side: Side, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """What is wanted of a side's sums (items, 2 padded dim + 1, padded n), in the shape of its tensors."""
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


backend = Triton()
