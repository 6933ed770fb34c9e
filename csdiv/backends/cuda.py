"""The CUDA C++ kernels on CUDA tensors: torch tensors in, pointers to csdiv._C, torch tensors out.

Kernels run on the tensors' device and torch's current stream there, in scratch memory of torch's allocator; nothing
waits for the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import csdiv._C as _C
from csdiv import reference
from csdiv.backends.arrays import PLAIN, Call, flattened
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import OPERATORS

_FLAT = ("overlap_lse", "assign", "full_overlap_lse", "full_pairwise", "full_assign")
"""Operators whose rows may share tiles, whatever problem they are of."""


class Cuda(Backend):
    composed = frozenset()
    lacks = frozenset(("factored_overlap_lse", "factored_pairwise", "factored_assign"))
    native: Any = _C
    """The module with the functions ``cuda_*``; tests put an emulation in its place."""

    def stream(self, device: torch.device) -> int:
        """The address of torch's current stream on ``device``."""
        return torch.cuda.current_stream(device).cuda_stream

    def processors(self, device: torch.device) -> int:
        """The number of multiprocessors: how work is cut depends on it, so results are the same on one device model."""
        return _processors(device)

    def current(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        """Makes ``device`` the current one for a while. Torch goes back to a device without a context by name alone;
        the native code would create one."""
        return torch.cuda.device(device)

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        if any(needs) and OPERATORS[name].at_once == "rows":
            raise NotImplementedError('backend "cuda": gradients of rows come from the backward pass alone')
        if (plain := self._plain(name, tensors, needs, None)) is not None:
            arguments, outputs, grads, _alive = plain
            if name in ("log_overlap", "self_overlap"):
                outputs[1].zero_()
            self._launch(f"cuda_{name}_forward", arguments, outputs[0].device)
            return outputs, grads
        call = Call(OPERATORS[name], tensors, needs)
        outputs = call.outputs()
        if name == "full_self_overlap":  # the kernel gives rows of the upper triangle
            self._run("cuda_full_self_overlap_forward", call, outputs[1:])
            outputs[0] = reference.logsumexp(reference.weighted(outputs[1], tensors[2]), -1)
        elif name == "overlap_lse":  # one offset where problems share tiles
            flat = flattened(call.problem)
            offset = outputs[1] if flat is call.problem else outputs[1].new_empty(1)
            self._run("cuda_overlap_lse_forward", call, [outputs[0], offset], flat=True)
            outputs[1] = offset.expand(outputs[1].shape).contiguous()
        else:
            if name in ("log_overlap", "self_overlap"):
                outputs[1].zero_()
            self._run(f"cuda_{name}_forward", call, outputs, flat=name in _FLAT)
        return outputs, call.gradients()

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        if name == "overlap_lse":
            outputs = [outputs[0] + outputs[1]]  # float64: nothing is lost
        grad = grad.to(tensors[0].dtype)
        if (plain := self._plain(name, tensors, needs, (grad, *outputs))) is not None:
            self._launch(f"cuda_{name}_backward", plain[0], grad.device)
            return plain[2]
        call = Call(OPERATORS[name], tensors, needs)
        if name == "full_self_overlap":
            # As rows whose own sides alone have gradients, twice: each pair's share of the total, not of its row.
            value = outputs[0].unsqueeze(-1)
            nothing = (tensors[2] == -math.inf) | (value == -math.inf) | (grad.unsqueeze(-1) == 0.0)
            grad = torch.where(nothing, 0.0, 2.0 * grad.unsqueeze(-1))
            outputs = [value - tensors[2]]
        arrays = [t.contiguous() for t in (grad, *outputs)]
        self._run(f"cuda_{name}_backward", call, arrays, flat=name in _FLAT)
        return call.gradients()

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        call = Call(OPERATORS[name], tensors, [False] * len(tensors))
        (index,) = call.outputs()
        self._run(f"cuda_{name}", call, [index], flat=True)
        return index

    def _run(self, function: str, call: Call, arrays: Sequence[Tensor], *, flat: bool = False) -> None:
        self._launch(function, call.arguments(arrays, flat=flat), arrays[0].device)

    def _plain(self, name: str, tensors: Tensors, needs: Sequence[bool], arrays: Sequence[Tensor] | None) -> Any:
        """What C++ makes of a call on contiguous tensors of one mixture a side, in less time than :class:`Call`."""
        return _C.plain_call(PLAIN[name], tensors, needs, arrays) if name in PLAIN else None

    def _launch(self, function: str, arguments: tuple[Any, ...], device: torch.device) -> None:
        """Calls a native function twice: for the size of its scratch memory, and with it."""
        run = getattr(self.native, function)
        where = (device.index or 0, self.stream(device), self.processors(device))
        size = run(*arguments, (*where, 0))
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        if size:
            with self.current(device):
                run(*arguments, (*where, scratch.data_ptr()))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


backend = Cuda()
