"""Gradients of the operators: which path a call takes, and the ``torch.autograd.Function`` of each path.

A call takes one of three paths.

1. Plain autograd and ``torch.compile``: a classic Function around the op pair; it costs the least per call. Without
   compilation the gradients of a scalar come with it, in one pass over the pairs, and the backward pass scales them;
   not so for what several values of a batch share. On CPUs those of the rows' sum come with the rows, and serve
   whatever upstream gradient is the same for all rows, as that of a sum or a mean; another takes a second pass.
2. ``torch.func`` transforms made of vmap and at most one grad: a Function with ``setup_context`` and a vmap rule that
   moves the mapped dimension into the batch, so the kernels stay native.
3. Forward-mode differentiation and nested grads: the reference formula, which torch differentiates to any order. The
   second derivative of path 1 takes it as well.

A backend named explicitly is never replaced: on path 3 it raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import backends, ops, transforms
from csdiv.backends.base import unsqueezed
from csdiv.backends.reference import formula
from csdiv.operators import OPERATORS, Operator
from csdiv.shapes import broadcast

_Tensors = Sequence[Tensor | None]


def parts(name: str, backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The value of an operator, differentiable, and the offset that is to be added to it; None: there is none."""
    outputs = _outputs(name, backend, tensors)
    return outputs[0], outputs[1] if len(outputs) > 1 and OPERATORS[name].has_offset else None


def _outputs(name: str, backend: str, tensors: _Tensors) -> tuple[Tensor, ...]:
    """The outputs of an operator; the reference formula has the value alone."""
    if torch.compiler.is_compiling():
        return _Value.apply(name, backend, False, *_distinct(tensors))
    if transforms.transforms_active() or transforms.forward_level() >= 0:
        if transforms.higher_derivatives():
            if backend != "auto":
                raise _no_derivative(backend, "forward-mode or nested derivatives")
            return (formula(name, tensors),)
        return _TransformableValue.apply(name, backend, *tensors)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return _Value.apply(name, backend, _gives_gradients(OPERATORS[name], backend, tensors), *tensors)
    return tuple(ops.run_forward(name, tensors, [False] * len(tensors), backend)[0])


def _distinct(tensors: _Tensors) -> list[Tensor | None]:
    """The tensors, repeated ones as views: torch.compile takes no Function of the same one twice."""
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def _gives_gradients(operator: Operator, backend: str, tensors: _Tensors) -> bool:
    """Whether gradients are to come with the values. Those of rows read the values of the upstream gradient: on a GPU
    the call would wait for them, and a fake tensor has none. For a batch of one row each they are quicker made than
    scaled."""
    if operator.at_once == "rows":
        means = tensors[0]
        if means is None or type(means) not in (Tensor, torch.nn.Parameter):
            return False
        of_one = means.ndim > 2 and means.shape[-2] == 1
        return not of_one and backend in ("auto", "cpu") and means.device.type == "cpu"
    return operator.at_once == "scalars"


def _no_derivative(backend: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f'backend "{backend}" has no {what}: backend="auto" takes the reference formula there, at its cost in memory'
    )


def _full_gradients(grads: Sequence[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    if len(grads) == len(needs):
        return tuple(grads)
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)


def assign(name: str, backend: str, *tensors: Tensor | None) -> Tensor:
    """The indices of "assign" or of its forms, also under vmap."""
    if not torch.compiler.is_compiling() and transforms.transforms_active():
        return _TransformableIndex.apply(name, backend, *tensors)
    return ops.ASSIGN[name](*tensors, backend)


# Path 1


class _Value(torch.autograd.Function):
    """Outputs of an operator; ``at_once``: whether their gradients come with them where that is possible."""

    @staticmethod
    def forward(ctx: Any, name: str, backend: str, at_once: bool, *tensors: Tensor | None) -> Any:
        operator, needs = OPERATORS[name], list(ctx.needs_input_grad[3:])
        rows = operator.at_once == "rows"
        at_once = at_once and any(needs) and (rows or _has_all_items(tensors, operator.event_dims, needs))
        ctx.name, ctx.backend, ctx.at_once = name, backend, at_once
        ctx.owns_gradients = at_once and not transforms.saved_tensors_are_hooked()
        outputs, grads = ops.run_forward(name, tensors, needs if at_once else [False] * len(needs), backend)
        saved = [] if at_once and not rows else [outputs[k] for k in operator.saved]
        ctx.save_for_backward(*tensors, *saved, *grads)
        if not operator.has_offset:
            return (outputs[0],)
        ctx.mark_non_differentiable(outputs[1])
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        needs = list(ctx.needs_input_grad[3:])
        call = (ctx.name, ctx.backend, needs, ctx.at_once)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transforms.higher_derivatives():
            grads = _Gradients.apply(*call, grad, *ctx.saved_tensors)
        else:
            grads = _first_gradients(
                *call, grad, ctx.saved_tensors, last_use=ctx.owns_gradients and not transforms.graph_is_kept()
            )
        return None, None, None, *_full_gradients(grads, needs)


class _Gradients(torch.autograd.Function):
    """The gradients of an operator as a differentiable function: its derivative is that of the reference formula."""

    @staticmethod
    def forward(ctx: Any, name: str, backend: str, needs: list[bool], at_once: bool, grad: Tensor, *saved: Any) -> Any:
        ctx.name, ctx.backend, ctx.needs = name, backend, needs
        ctx.save_for_backward(grad, *saved[: len(needs)])
        return tuple(_first_gradients(name, backend, needs, at_once, grad, saved))

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        if ctx.backend not in ("auto", "reference"):
            raise _no_derivative(ctx.backend, "second derivatives")
        with torch.enable_grad():
            # Views are new variables: grad may itself depend on the tensors, which is another path than this one.
            inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors]
            grad, *tensors = inputs
            wanted = [t for t, need in zip(tensors, ctx.needs, strict=True) if need]
            firsts = torch.autograd.grad(formula(ctx.name, tensors), wanted, grad, create_graph=True)
            targets = [t for t in inputs if t is not None and t.requires_grad]
            seconds = torch.autograd.grad(
                firsts, targets, grad_grads, allow_unused=True, create_graph=torch.is_grad_enabled()
            )
        found = iter(seconds)
        results = [next(found) if t is not None and t.requires_grad else None for t in inputs]
        saved_outputs = len(ctx.needs_input_grad) - 4 - len(inputs)
        return None, None, None, None, *results, *(None,) * saved_outputs


def _first_gradients(
    name: str,
    backend: str,
    needs: list[bool],
    at_once: bool,
    grad: Tensor,
    saved: Sequence[Any],
    *,
    last_use: bool = False,
) -> Sequence[Tensor]:
    """From what _Value saves: tensors, outputs, and the gradients that came with them, which may be changed if this is
    their last use."""
    count = len(needs)
    end = len(saved) - sum(needs) if at_once else len(saved)
    tensors, outputs = saved[:count], list(saved[count:end])
    if at_once:
        rows = OPERATORS[name].at_once == "rows"
        chosen = backends.resolve(backend, grad.device, name)
        if (scaled := chosen.scaled(saved[end:], grad, one_factor=rows, in_place=last_use)) is not None:
            return scaled
        if not rows:
            found, _ = ops.run_forward(name, tensors, [False] * len(needs), backend)
            outputs = [found[k] for k in OPERATORS[name].saved]
            grads = ops.run_backward(name, grad, outputs, tensors, needs, backend)
            return [torch.where(unsqueezed(grad, g) == 0.0, 0.0, g) for g in grads]
    return ops.run_backward(name, grad, outputs, tensors, needs, backend)


def _has_all_items(tensors: _Tensors, event_dims: tuple[int, ...], needs: list[bool]) -> bool:
    """Whether every tensor that needs a gradient has all batch dimensions, so that it is of one value of the batch."""
    if all(t is None or t.ndim == e for t, e in zip(tensors, event_dims, strict=True)):
        return True
    shapes = [torch.Size() if t is None else t.shape[: t.ndim - e] for t, e in zip(tensors, event_dims, strict=True)]
    batch = broadcast(*shapes) if any(shapes) else torch.Size()
    return all(shape == batch for shape, need in zip(shapes, needs, strict=True) if need)


# Path 2


class _TransformableValue(torch.autograd.Function):
    @staticmethod
    def forward(name: str, backend: str, *tensors: Tensor | None) -> Any:
        return tuple(ops.run_forward(name, tensors, [False] * len(tensors), backend)[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors, *(output[k] for k in OPERATORS[ctx.name].saved))
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        needs = list(ctx.needs_input_grad[2:])
        grads = _TransformableGradients.apply(ctx.name, ctx.backend, needs, grad, *ctx.saved_tensors)
        return None, None, *_full_gradients(grads, needs)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, backend: str, *tensors: Tensor | None) -> Any:
        outputs = _TransformableValue.apply(name, backend, *_moved(name, tensors, in_dims[2:]))
        return outputs, (0,) * len(outputs)


class _TransformableIndex(torch.autograd.Function):
    @staticmethod
    def forward(name: str, backend: str, *tensors: Tensor | None) -> Tensor:
        return ops.ASSIGN[name](*tensors, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, backend: str, *tensors: Tensor | None) -> Any:
        return _TransformableIndex.apply(name, backend, *_moved(name, tensors, in_dims[2:])), 0


class _TransformableGradients(torch.autograd.Function):
    @staticmethod
    def forward(name: str, backend: str, needs: list[bool], grad: Tensor, *saved: Any) -> Any:
        tensors, outputs = list(saved[: len(needs)]), list(saved[len(needs) :])
        return tuple(ops.BACKWARD[name](grad, outputs, tensors, needs, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        raise AssertionError("nested derivatives take the reference formula")

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, backend: str, needs: list[bool], grad: Tensor, *saved: Any) -> Any:
        count, size, event_dims = len(needs), info.batch_size, OPERATORS[name].event_dims
        tensors, dims = saved[:count], in_dims[4 : 4 + count]
        rank = _batch_rank(tensors, dims, event_dims)
        # Every tensor that wants a gradient gets one for each mapped item.
        moved = [
            _move(t, dim, event, rank, size if need else None)
            for t, dim, event, need in zip(tensors, dims, event_dims, needs, strict=True)
        ]
        outputs = [_to_front(t, dim, size) for t, dim in zip(saved[count:], in_dims[4 + count :], strict=True)]
        grad = _to_front(grad, in_dims[3], size)
        grads = _TransformableGradients.apply(name, backend, needs, grad, *moved, *outputs)
        wanted = (t for t, need in zip(zip(tensors, dims, strict=True), needs, strict=True) if need)
        shapes = [_mapped_shape(t, dim, size) for t, dim in wanted]
        return tuple(g.reshape(s) for g, s in zip(grads, shapes, strict=True)), (0,) * len(grads)


def _moved(name: str, tensors: _Tensors, dims: Sequence[int | None]) -> list[Tensor | None]:
    """The tensors of an operator with the mapped dimension as the first of the batch."""
    event_dims = OPERATORS[name].event_dims
    rank = _batch_rank(tensors, dims, event_dims)
    return [_move(t, d, e, rank) for t, d, e in zip(tensors, dims, event_dims, strict=True)]


def _batch_rank(tensors: _Tensors, dims: Sequence[int | None], event_dims: tuple[int, ...]) -> int:
    """The largest number of batch dimensions among the tensors, the mapped one not counted."""
    ranks = [
        t.ndim - event - (dim is not None)
        for t, dim, event in zip(tensors, dims, event_dims, strict=True)
        if t is not None
    ]
    return max(ranks)


def _move(t: Tensor | None, dim: int | None, event: int, rank: int, expand: int | None = None) -> Tensor | None:
    """``t`` with its mapped dimension first, then ``rank`` batch dimensions, then its own; one if it is not mapped."""
    if t is None:
        return None
    t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    while t.ndim < 1 + rank + event:
        t = t.unsqueeze(1)
    return t if expand is None else t.expand(expand, *t.shape[1:])


def _to_front(t: Tensor, dim: int | None, size: int) -> Tensor:
    t = t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    return t.expand(size, *t.shape[1:])


def _mapped_shape(t: Tensor, dim: int | None, size: int) -> tuple[int, ...]:
    shape = list(t.shape)
    if dim is not None:
        del shape[dim]
    return (size, *shape)
