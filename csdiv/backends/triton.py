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

from csdiv.backends.arrays import Call, Problem, Side, flattened, of_own, summed_to
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
        return _cs_divergence_gradients(call, packed, processors, grad, outputs[1], tensors, needs)
    if name == "self_overlap":
        sums = _self_sums(packed, _log2_totals(packed, outputs[0].reshape(-1)), needs, processors)
        return _of_side(_times(2.0 if grad is None else 2.0 * grad.reshape(-1), sums), call.problem.p, tensors, needs)
    if name == "pairwise":
        assert grad is not None
        weights = Weights(given=grad.contiguous())
    elif name == "overlap_lse":
        if grad is None:
            raise NotImplementedError('backend "triton": gradients of rows come from the backward pass alone')
        row_lse = outputs[0] + outputs[1]  # float64: nothing is lost
        weights = _shares_of_rows(packed, *(t.reshape(packed.batch, swept.n) for t in (row_lse, grad)))
    else:
        weights = Weights(packed.p.log2_weights, _log2_totals(packed, outputs[0].reshape(-1)))
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
    grad: Tensor | None,
    overlaps: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    problem = call.problem
    offsets = packed.scale.offsets.unsqueeze(-1)
    pq, *own_totals = _log2_totals(packed, overlaps.reshape(-1, 3), offsets).mT.contiguous()
    grad = None if grad is None else grad.double().reshape(problem.batch)
    weights = Weights(packed.p.log2_weights, pq)
    gradients = []
    sides = ((problem.p, packed.p, tensors[:3], needs[:3]), (problem.q, packed.q, tensors[3:], needs[3:]))
    for (side, packed_side, side_tensors, side_needs), own_total in zip(sides, own_totals, strict=True):
        if not any(side_needs):
            continue
        of_p, factors = packed_side is packed.p, None if grad is None else grad.reshape(-1)
        sums = _item_sums(problem, packed, weights, side_needs, factors, processors, of_p=of_p)
        if packed.batch:
            totals = of_own(own_total.view(problem.batch), side.own).reshape(-1).contiguous()
            own_sums = _self_sums(packed.with_itself(packed_side), totals, side_needs, processors)
            shared = packed.batch // max(side.own.numel(), 1)
            sums = _times(shared if grad is None else summed_to(grad, side.own).reshape(-1), own_sums) - sums
        gradients += _of_side(sums, side, side_tensors, side_needs)
    return gradients


def _log2_totals(packed: pack.Problem, values: Tensor, offsets: Tensor | None = None) -> Tensor:
    """log2 of sums over all pairs as the kernels add them up, from what they are in nats with their offsets."""
    return LOG2_E * (values - (packed.scale.offsets if offsets is None else offsets))


def _shares_of_rows(packed: pack.Problem, row_lse: Tensor, grad: Tensor) -> Weights:
    """The share of a pair in its row, whose logarithm is ``row_lse`` (batch, n) float64, times the row's gradient."""
    shares = LOG2_E * (packed.scale.offsets.unsqueeze(-1) - row_lse).where(grad != 0, -math.inf)
    padding = (0, packed.p.padded - packed.p.n)
    shares, factors = (torch.nn.functional.pad(t, padding, value=x) for t, x in ((shares, -math.inf), (grad, 0.0)))
    return Weights(shares.to(packed.dtype), p_factors=factors.contiguous())


def _times(factors: Tensor | float, sums: Tensor) -> Tensor:
    """Each of the sums (items, ...) times its factor (items,), or the one; zero gives zero."""
    if not isinstance(factors, Tensor):
        return sums if factors == 1 else factors * sums
    factors = factors.view(-1, *(1,) * (sums.ndim - 1))
    return (factors * sums).masked_fill_(factors == 0, 0.0)


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
    return summed_to(sums.view(*problem.batch, *sizes), (*own, *sizes)).reshape(own.numel(), *sizes)


def _self_sums(packed: pack.Problem, totals: Tensor, needs: Sequence[bool], processors: int) -> Tensor:
    """Half of equation (6): each item of a side with itself, of log2 sums ``totals`` (items,)."""
    weights = Weights(packed.p.log2_weights, totals)
    return launch_gradient_sweep(packed, weights, processors, of_p=False, dimensions=any(needs[:2]))


def _of_side(sums: Tensor, side: Side, tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """What is wanted of a side's sums (items, 2 padded dim + 1, padded n), in the shape of its tensors."""
    n, dim = side.means.shape[-2:]
    padded = sums.shape[1] // 2
    sums = sums[..., : side.own.numel() * n // max(len(sums), 1)]  # of several items where they were flattened
    means, variances = (sums[:, begin : begin + dim].mT for begin in (0, padded))
    gradients = []
    for grad, factor, t, need in zip((means, variances, sums[:, -1]), (1.0, 0.5, 1.0), tensors, needs, strict=False):
        if need:
            grad = summed_to(grad.reshape(*side.own, n, *grad.shape[2:]), t.shape)
            gradients.append(torch.mul(grad, factor, out=t.new_empty(t.shape)))
    return gradients


backend = Triton()
