"""The C++ kernels on CPU tensors: torch tensors in, pointers to csdiv._C, torch tensors out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

import csdiv._C as _C
from csdiv import reference, transforms
from csdiv.backends.arrays import PLAIN, Call, empty_like, make_points
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import OPERATORS, Operator
from csdiv.shapes import broadcast

_C.cpu_share_openmp_threads()
os.register_at_fork(after_in_child=_C.cpu_share_openmp_threads)  # see csdiv/process.py


class _PointsCall(Call):
    """A full operator whose p has one covariance for all components: they are points to the kernels, and q has the
    sums, each of which is factored once."""

    def __init__(self, operator: Operator, tensors: Tensors, needs: Sequence[bool]) -> None:
        p_means, p_covariances, q_means, q_covariances, *weights = tensors
        self._tensors, self._needs = tensors, needs
        self._sums_needs = [needs[0], False, needs[2], needs[1] or needs[3], *needs[4:]]
        sums = (p_means, p_covariances, q_means, q_covariances + p_covariances, *weights)
        super().__init__(operator, sums, self._sums_needs, make_points(p_means))

    def gradients(self) -> list[Tensor]:
        found = dict(zip((k for k, need in enumerate(self._sums_needs) if need), super().gradients(), strict=True))
        if 3 in found:
            found[1] = found[3]  # each covariance has the gradient of the sum
        return [found[k].sum_to_size(self._tensors[k].shape) for k, need in enumerate(self._needs) if need]


def _call(name: str, tensors: Tensors, needs: Sequence[bool]) -> Call:
    operator = OPERATORS[name]
    if name.startswith("factored_"):
        return Call(operator, tensors, needs, make_points(tensors[0]))
    if operator.full and operator.q and tensors[1].shape[-3] == 1:
        shapes = [t.shape[:-event] for t, event in zip(tensors[2:], operator.event_dims[2:], strict=True)]
        q_batch = broadcast(*shapes)
        # Not where each problem of a batch would need its own sums.
        if broadcast(q_batch, tensors[1].shape[:-3]) == q_batch:
            return _PointsCall(operator, tensors, needs)
    return Call(operator, tensors, needs)


def _run(function: str, call: Call, arrays: Sequence[Tensor]) -> None:
    getattr(_C, function)(*call.arguments(arrays), torch.get_num_threads())


def _is_array(t: Tensor) -> bool:
    """Not where a hook gives back saved gradients in another form."""
    return t.is_contiguous() and t.dtype in (torch.float32, torch.float64)


class Cpu(Backend):
    composed = frozenset()

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        if name in PLAIN and (plain := _C.plain_call(PLAIN[name], tensors, needs, None)) is not None:
            arguments, outputs, grads, _alive = plain
            getattr(_C, f"cpu_{name}_forward")(*arguments, torch.get_num_threads())
            return outputs, grads
        call = _call(name, tensors, needs)
        outputs = call.outputs()
        if name == "full_self_overlap":  # the kernel gives rows of the upper triangle
            _run("cpu_full_self_overlap_forward", call, outputs[1:])
            outputs[0] = reference.logsumexp(reference.weighted(outputs[1], tensors[2]), -1)
        else:
            _run(f"cpu_{name}_forward", call, outputs)
        return outputs, call.gradients()

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        if name in PLAIN:
            upstream = grad.to(tensors[0].dtype)
            if (plain := _C.plain_call(PLAIN[name], tensors, needs, (upstream, *outputs))) is not None:
                getattr(_C, f"cpu_{name}_backward")(*plain[0], torch.get_num_threads())
                return plain[2]
        call = _call(name, tensors, needs)
        if name == "full_self_overlap":
            (value, row_lse), outputs = outputs, outputs[1:]
            value = value.unsqueeze(-1)
            shares = (reference.weighted(row_lse, tensors[2]) - value).exp()
            grad = grad.unsqueeze(-1)
            grad = torch.where((value == -math.inf) | (grad == 0.0), 0.0, grad * shares)
        arrays = [t.contiguous() for t in (grad.to(tensors[0].dtype), *outputs)]
        _run(f"cpu_{name}_backward", call, arrays)
        return call.gradients()

    def scaled(
        self, grads: Sequence[Tensor], grad: Tensor, *, one_factor: bool, in_place: bool = False
    ) -> list[Tensor] | None:
        if transforms.watched((grad, grads[0])) or not all(map(_is_array, grads)):
            return super().scaled(grads, grad, one_factor=one_factor)
        factors, count = grad, grad.numel()
        if not grad.is_contiguous():
            if one_factor and count > 0 and not any(grad.stride()):  # of a sum
                count = 1
            else:
                factors = grad.contiguous()
        found, arrays = [], []
        for g in grads:
            found.append(g if in_place else empty_like(g))
            arrays.append((g.data_ptr(), found[-1].data_ptr(), g.numel(), g.itemsize))
        upstream = (factors.data_ptr(), count, factors.itemsize, one_factor)
        return found if _C.cpu_scaled(upstream, tuple(arrays), torch.get_num_threads()) else None

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        call = _call(name, tensors, [False] * len(tensors))
        (index,) = call.outputs()
        _run(f"cpu_{name}", call, [index])
        return index


backend = Cpu()
