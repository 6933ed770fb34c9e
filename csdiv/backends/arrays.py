"""Torch tensors as the native kernels read them: contiguous float32 or float64 arrays of full shape, (items, K, D).

Structure, strides and batch dimensions are resolved here, in O((N + M) D) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csdiv.backends.base import Tensors
from csdiv.operators import OPERATORS, Operator, Output
from csdiv.shapes import broadcast

_NOT_WANTED = (0, 0, 0)


class Side(NamedTuple):
    """One side as the kernels read it; the tensors are held so that their memory outlives the call."""

    means: Tensor  # (*own batch, K, D) contiguous
    variances: Tensor  # (*own batch, K, D) contiguous; covariances, (*own batch, K, D, D), of a full side
    log_weights: Tensor | None  # (*own batch, K) contiguous; None: zeros
    own: torch.Size
    same_dims: bool = False  # a variance for each component, whatever the dimension
    same_components: bool = False  # variances that all components of all items have
    tied: bool = False  # variances that all components of an item have


def make_side(full: bool, means: Tensor, spread: Tensor, log_weights: Tensor | None = None) -> Side:
    """``spread`` is variances, or covariances of a full side."""
    size = means.shape
    if not full and spread.shape == size and (log_weights is None or log_weights.shape == size[:-1]):
        weights = None if log_weights is None else log_weights.contiguous()
        k, dim = size[-2:]
        return Side(means.contiguous(), spread.contiguous(), weights, size[:-2], dim == 1, means.numel() == dim, k == 1)
    own, items = means.shape[:-2], spread.shape[: -3 if full else -2]
    if items != own or (log_weights is not None and log_weights.shape[:-1] != own):
        own = broadcast(own, items, *([] if log_weights is None else [log_weights.shape[:-1]]))
    shape = own + means.shape[-2:]
    if log_weights is not None:
        log_weights = _filled(log_weights, shape[:-1])
    means = _filled(means, shape)
    if full:
        return Side(means, _filled(spread, shape + shape[-1:]), log_weights, own)
    same = (spread.shape[-1] == 1, spread.shape[:-1].numel() == 1, spread.shape[-2] == 1)
    return Side(means, _filled(spread, shape), log_weights, own, *same)


def make_points(means: Tensor) -> Side:
    """Components of zero variance: an empty tensor, whose pointer is 0, in place of one."""
    return Side(means.contiguous(), means.new_empty(0), None, means.shape[:-2])


def _filled(t: Tensor, shape: torch.Size) -> Tensor:
    """``t`` as a contiguous array of the full shape; ``t`` itself if it is one."""
    return t if t.shape == shape and t.is_contiguous() else t.expand(shape).contiguous()


class Problem:
    """p against q, `batch` times; ``others`` are batches of tensors of neither."""

    def __init__(self, p: Side, q: Side, others: Sequence[torch.Size] = ()) -> None:
        self.p, self.q = p, q
        self.n, self.m = p.means.shape[-2], q.means.shape[-2]
        self.batch = p.own
        self.indices: tuple[Tensor | None, Tensor | None] = (None, None)
        if p.own != q.own or others:
            self.batch = broadcast(p.own, q.own, *others)
            device = p.means.device
            self.indices = _batch_index(p.own, self.batch, device), _batch_index(q.own, self.batch, device)

    def pointers(self) -> tuple[tuple[int, ...], ...]:
        """Both sides in the form that csrc/bindings.cpp describes."""
        return _pointers(self.p, self.n, self.indices[0]), _pointers(self.q, self.m, self.indices[1])


def _pointers(side: Side, n: int, index: Tensor | None) -> tuple[int, ...]:
    weights = side.log_weights
    return (
        side.means.data_ptr(),
        side.variances.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        0 if index is None else index.data_ptr(),
        side.own.numel(),
        n,
        side.same_dims,
        side.same_components,
    )


def _batch_index(own: torch.Size, batch: torch.Size, device: torch.device) -> Tensor | None:
    """Which item of a side each problem uses; None where that is plain: its own, or the only one."""
    if own == batch or own.numel() == 1 or own.numel() == batch.numel():
        return None
    return torch.arange(own.numel(), device=device).view(own).expand(batch).reshape(-1)


def of_own(t: Tensor, shape: Sequence[int]) -> Tensor:
    """What is the same for all problems that share an item, (*batch, ...), for each item, in ``shape``."""
    t = t[(0,) * (t.ndim - len(shape))]
    for dim, size in enumerate(shape):
        t = t.narrow(dim, 0, size)
    return t


def summed_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """``t.sum_to_size(shape)``, which adds up one number where there is nothing to add up."""
    return t if t.shape == torch.Size(shape) else t.sum_to_size(shape)


def flattened(problem: Problem) -> Problem:
    """A batch of p against one q as one problem: rows of different problems share tiles; outputs keep their layout."""
    p, q = problem.p, problem.q
    if p.own != problem.batch or q.own.numel() != 1 or len(problem.batch) == 0:
        return problem
    return Problem(_one_item(p, p.own.numel() * p.means.shape[-2]), _one_item(q, q.means.shape[-2]))


def _one_item(side: Side, n: int) -> Side:
    """All components of all items, n, as those of one."""
    batch = len(side.own)
    means, variances = (t.reshape(n, *t.shape[batch + 1 :]) for t in (side.means, side.variances))
    log_weights = None if side.log_weights is None else side.log_weights.reshape(n)
    tied = side.same_components if side.own.numel() > 1 else side.tied
    return Side(means, variances, log_weights, torch.Size(), side.same_dims, side.same_components, tied)


def empty_output(output: Output, means: Tensor, batch: torch.Size, **sizes: int) -> Tensor:
    """An uninitialised output; ``sizes`` are those of the letters in its shape."""
    shape: tuple[int, ...] = batch
    for size in output.sizes:
        shape = (*shape, sizes[size] if size in sizes else int(size))
    return means.new_empty(shape) if output.dtype is None else means.new_empty(shape, dtype=output.dtype)


_MANY_BYTES = 2**21
"""From here on the system may be asked for each array's memory, whose pages take longer than the arithmetic."""


def empty_like(t: Tensor) -> Tensor:
    """As torch has it; the system is asked for large pages of what is large, on the CPU."""
    made = torch.empty_like(t)
    if t.device.type == "cpu" and t.nbytes >= _MANY_BYTES:
        import csdiv._C as _C  # which the other backends do without

        _C.cpu_ask_for_huge_pages(made.data_ptr(), made.nbytes)
    return made


class Call:
    """An operator on tensors as a native function takes it: the problem, outputs, and gradients where needed."""

    def __init__(self, operator: Operator, tensors: Tensors, needs: Sequence[bool], p: Side | None = None) -> None:
        own, full = len(operator.p), operator.full
        end = own + len(operator.q)
        self.operator = operator
        p = p or make_side(full, *tensors[:own])
        q = make_side(full, *tensors[own:end]) if operator.q else p
        self.problem = Problem(p, q)
        self._others: list[Tensor] = []
        self._grads: list[tuple[Tensor, Tensor]] = []  # each array and the tensor that it is the gradient to
        self._grad_pointers = (_NOT_WANTED, _NOT_WANTED)
        if True in needs:
            self._grad_pointers = (
                self._allocate(p, tensors[:own], needs[:own]),
                self._allocate(q, tensors[own:end], needs[own:end]) if end > own else _NOT_WANTED,
            )
        if operator.others:
            self._add_others(tensors[end:], needs[end:])

    def _allocate(self, side: Side, tensors: Tensors, needs: Sequence[bool]) -> tuple[int, int, int]:
        """Addresses of the gradients to means, variances and log weights, 0 where not wanted."""
        addresses = [0, 0, 0]
        for k, (need, like) in enumerate(zip(needs, (side.means, side.variances, side.log_weights), strict=False)):
            if need and like is not None:
                array = empty_like(like)
                self._grads.append((array, tensors[k]))
                addresses[k] = array.data_ptr()
        return addresses[0], addresses[1], addresses[2]

    def _add_others(self, tensors: Tensors, needs: Sequence[bool]) -> None:
        """Tensors of neither side in full shape, (*batch, *sizes), each followed by its gradient; or empty ones."""
        others, p, q = self.operator.others, self.problem.p, self.problem.q
        given = [(t, other) for t, other in zip(tensors, others, strict=True) if t is not None]
        if given:
            self.problem = Problem(p, q, [t.shape[: t.ndim - len(other.sizes)] for t, other in given])
        known = {"N": self.problem.n, "M": self.problem.m, "D": p.means.shape[-1], "1": 1}
        for tensor, other, need in zip(tensors, others, needs, strict=True):
            if tensor is None:
                self._others += [p.means.new_empty(0)] * 2
                continue
            shape = self.problem.batch + torch.Size(known[size] for size in other.sizes)
            array = _filled(tensor.to(other.dtype or tensor.dtype), shape)
            grad = torch.empty_like(array) if need else array.new_empty(0)
            self._others += (array, grad)
            if need:
                self._grads.append((grad, tensor))

    def outputs(self) -> list[Tensor]:
        problem = self.problem
        means, batch, n, m = problem.p.means, problem.batch, problem.n, problem.m
        return [empty_output(output, means, batch, N=n, M=m) for output in self.operator.outputs]

    def arguments(self, arrays: Sequence[Tensor], *, flat: bool = False) -> tuple[object, ...]:
        """What every native function takes first; ``arrays``, all contiguous: the gradient of the value, outputs.

        Each tensor of neither side and its gradient come after these.
        """
        problem = flattened(self.problem) if flat else self.problem
        means = problem.p.means
        return (
            means.itemsize,
            problem.batch.numel(),
            means.shape[-1],
            tuple([t.data_ptr() for t in (*arrays, *self._others)]),
            problem.pointers(),
            self._grad_pointers,
        )

    def gradients(self) -> list[Tensor]:
        """Those that are needed, in the shapes of the tensors."""
        return [a if a.shape == t.shape else a.sum_to_size(t.shape) for a, t in self._grads]


PLAIN = {
    name: (
        *(len(kinds) for kinds in (operator.p, operator.q, operator.others)),
        tuple((output.sizes, output.dtype is torch.float64) for output in operator.outputs),
    )
    for name, operator in OPERATORS.items()
    if not (operator.full or operator.channels or operator.name.endswith("assign"))
}
"""What csrc/plain_call.h has to know of an operator; it does what :class:`Call` does."""
