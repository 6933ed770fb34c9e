"""Gradients of the operators: which path a call takes, and the ``torch.autograd.Function`` of each op pair.

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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from csdiv import ops
from csdiv.backends import reference

_Tensors = tuple[Tensor | None, ...]


class _OpPair(NamedTuple):
    """An operator, its backward and the same quantity as differentiable torch."""

    forward: Callable[..., tuple[Any, ...]]  # (backend, needs, *tensors) -> value, what backward takes, gradients
    backward: Callable[..., list[Tensor]]  # (backend, needs, grad, tensors, outputs) -> gradients where needed
    reference: Callable[..., Tensor]  # (*tensors) -> value
    event_dims: tuple[int, ...]  # of each tensor, beside its batch dimensions
    at_once: str = "scalars"  # which values forward gives the gradients of, where needed: "scalars", "rows" or "none"


def _full_gradients(grads: list[Tensor], needs: list[bool]) -> tuple[Tensor | None, ...]:
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)


def _scaled(grads: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of the values, (*batch, ...), times the gradients with respect to the values, (*batch)."""
    if grad.ndim == 0:
        return list(torch._foreach_mul(grads, grad))  # one call, where each costs more than what it computes
    return [grad.to(g.dtype).reshape(grad.shape + (1,) * (g.ndim - grad.ndim)) * g for g in grads]


def _common_value(grad: Tensor) -> Tensor | None:
    """The one value that ``grad`` consists of, None where there are several or it is 0 or NaN."""
    if grad.numel() == 0:
        return None
    common = grad[(0,) * grad.ndim]
    return common if common != 0 and torch.equal(grad, common.expand_as(grad)) else None


def _no_derivative(backend: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f'backend "{backend}" has no {what}: backend="auto" takes the reference formula there, at its cost in memory'
    )


def _make_functions(pair: _OpPair) -> tuple[Any, Any]:
    """The classic Function and the transformable one of an op pair, both applied to ``(backend, *tensors)``."""

    class Backward(torch.autograd.Function):
        """The backward op as a differentiable function: its derivative is that of the reference formula."""

        @staticmethod
        def forward(
            ctx: Any, backend: str, needs: list[bool], at_once: bool, count: int, grad: Tensor, *rest: Any
        ) -> Any:
            ctx.backend, ctx.needs, ctx.count = backend, needs, count
            ctx.save_for_backward(grad, *rest[:count])
            return tuple(first_gradients(backend, needs, at_once, grad, list(rest[:count]), list(rest[count:])))

        @staticmethod
        def backward(ctx: Any, *grad_grads: Tensor) -> Any:
            if ctx.backend not in ("auto", "reference"):
                raise _no_derivative(ctx.backend, "second derivatives")
            with torch.enable_grad():
                # Views are new variables: grad may itself depend on the tensors, which is another path than this one.
                inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in ctx.saved_tensors]
                grad, *tensors = inputs
                wanted = [t for t, need in zip(tensors, ctx.needs, strict=True) if need]
                firsts = torch.autograd.grad(pair.reference(*tensors), wanted, grad, create_graph=True)
                targets = [t for t in inputs if t is not None and t.requires_grad]
                seconds = torch.autograd.grad(
                    firsts, targets, grad_grads, allow_unused=True, create_graph=torch.is_grad_enabled()
                )
            found = iter(seconds)
            results = [next(found) if t is not None and t.requires_grad else None for t in inputs]
            saved_outputs = len(ctx.needs_input_grad) - 5 - ctx.count
            return None, None, None, None, *results, *(None,) * saved_outputs

    def first_gradients(
        backend: str, needs: list[bool], at_once: bool, grad: Tensor, tensors: list[Any], saved: list[Tensor]
    ) -> list[Tensor]:
        if not at_once:
            return pair.backward(backend, needs, grad, tensors, saved)
        if pair.at_once == "scalars":
            return _scaled(saved, grad)
        outputs, grads = saved[: -sum(needs)], saved[-sum(needs) :]
        common = _common_value(grad)
        return pair.backward(backend, needs, grad, tensors, outputs) if common is None else _scaled(grads, common)

    class Classic(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, backend: str, at_once: bool, *tensors: Tensor | None) -> Any:
            needs = list(ctx.needs_input_grad[2:])
            rows = pair.at_once == "rows"
            ctx.at_once = at_once and any(needs) and (rows or _has_all_items(tensors, pair.event_dims, needs))
            ctx.backend = backend
            *outputs, grads = pair.forward(backend, needs if ctx.at_once else [False] * len(needs), *tensors)
            ctx.save_for_backward(*tensors, *([] if ctx.at_once and not rows else outputs), *grads)
            ctx.mark_non_differentiable(*outputs[1:])
            return tuple(outputs)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
            count = len(pair.event_dims)
            needs = list(ctx.needs_input_grad[2:])
            saved = ctx.saved_tensors
            if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not reference_needed():
                grads = Backward.apply(ctx.backend, needs, ctx.at_once, count, grad, *saved)
            else:
                tensors, rest = list(saved[:count]), list(saved[count:])
                grads = first_gradients(ctx.backend, needs, ctx.at_once, grad, tensors, rest)
            return None, None, *_full_gradients(grads, needs)

    class TransformableBackward(torch.autograd.Function):
        @staticmethod
        def forward(backend: str, needs: list[bool], count: int, grad: Tensor, *rest: Any) -> Any:
            return tuple(pair.backward(backend, needs, grad, list(rest[:count]), list(rest[count:])))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grad_grads: Tensor) -> Any:
            raise AssertionError("nested derivatives take the reference formula")

        @staticmethod
        def vmap(info: Any, in_dims: Any, backend: str, needs: list[bool], count: int, grad: Tensor, *rest: Any) -> Any:
            tensors, saved = rest[:count], rest[count:]
            dims, saved_dims = in_dims[4 : 4 + count], in_dims[4 + count :]
            size, rank = info.batch_size, _batch_rank(tensors, dims, pair.event_dims)
            # Every tensor that wants a gradient gets one for each mapped item.
            moved = [
                _move(t, dim, event, rank, size if need else None)
                for t, dim, event, need in zip(tensors, dims, pair.event_dims, needs, strict=True)
            ]
            grad = _to_front(grad, in_dims[3], size)
            outputs = [_to_front(t, dim, size) for t, dim in zip(saved, saved_dims, strict=True)]
            grads = TransformableBackward.apply(backend, needs, count, grad, *moved, *outputs)
            wanted = (t for t, need in zip(zip(tensors, dims, strict=True), needs, strict=True) if need)
            shapes = [_mapped_shape(t, dim, size) for t, dim in wanted]
            return tuple(g.reshape(s) for g, s in zip(grads, shapes, strict=True)), (0,) * len(grads)

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(backend: str, *tensors: Tensor | None) -> Any:
            *outputs, _ = pair.forward(backend, [False] * len(tensors), *tensors)
            return tuple(outputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.backend = inputs[0]
            ctx.save_for_backward(*inputs[1:], *output)
            ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *rest: Any) -> Any:
            needs = list(ctx.needs_input_grad[1:])
            grads = TransformableBackward.apply(ctx.backend, needs, len(pair.event_dims), grad, *ctx.saved_tensors)
            return None, *_full_gradients(list(grads), needs)

        @staticmethod
        def vmap(info: Any, in_dims: Any, backend: str, *tensors: Tensor | None) -> Any:
            dims = in_dims[1:]
            rank = _batch_rank(tensors, dims, pair.event_dims)
            moved = [_move(t, d, e, rank) for t, d, e in zip(tensors, dims, pair.event_dims, strict=True)]
            outputs = Transformable.apply(backend, *moved)
            return outputs, (0,) * len(outputs)

    return Classic, Transformable


def _has_all_items(tensors: _Tensors, event_dims: tuple[int, ...], needs: list[bool]) -> bool:
    """Whether every tensor that needs a gradient has all batch dimensions, so that it is of one value of the batch."""
    shapes = [torch.Size() if t is None else t.shape[: t.ndim - e] for t, e in zip(tensors, event_dims, strict=True)]
    batch = torch.broadcast_shapes(*shapes) if any(shapes) else torch.Size()
    return all(shape == batch for shape, need in zip(shapes, needs, strict=True) if need)


def _batch_rank(tensors: _Tensors, dims: tuple[int | None, ...], event_dims: tuple[int, ...]) -> int:
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


def reference_needed() -> bool:
    """Whether derivatives are under way that only the reference has: forward mode, or a grad within a grad."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    keys = [str(i.key()).rsplit(".", 1)[-1] for i in retrieve_all_functorch_interpreters()]
    return "Jvp" in keys or keys.count("Grad") > 1


def _entry(pair: _OpPair) -> Callable[..., tuple[Tensor, ...]]:
    """``(backend, *tensors) -> outputs``, the first of them differentiable; the reference returns that one alone."""
    classic, transformable = _make_functions(pair)

    def entry(backend: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        if backend == "reference":
            return (pair.reference(*tensors),)
        if torch.compiler.is_compiling():
            return classic.apply(backend, False, *tensors)
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            if reference_needed():
                if backend != "auto":
                    raise _no_derivative(backend, "forward-mode or nested derivatives")
                return (pair.reference(*tensors),)
            return transformable.apply(backend, *tensors)
        return classic.apply(backend, torch.is_grad_enabled() and gives_gradients(backend, tensors[0]), *tensors)

    def gives_gradients(backend: str, means: Tensor | None) -> bool:
        if (
            pair.at_once == "rows"
        ):  # the upstream gradient is looked at: a GPU would be waited for, a fake has no values
            plain = type(means) in (Tensor, torch.nn.Parameter)
            return plain and backend in ("auto", "cpu") and means is not None and means.device.type == "cpu"
        return pair.at_once == "scalars"

    return entry


_overlap_lse = _entry(
    _OpPair(
        lambda backend, needs, *t: ops.overlap_lse_forward(*t, needs, backend),
        lambda backend, needs, grad, t, out: ops.overlap_lse_backward(grad, t, out, needs, backend),
        reference.overlap_lse,
        (2, 2, 2, 2, 1),
        at_once="rows",
    )
)
_log_overlap = _entry(
    _OpPair(
        lambda backend, needs, *t: ops.log_overlap_forward(*t, needs, backend),
        lambda backend, needs, grad, t, out: ops.log_overlap_backward(grad, t, [out[0], out[2]], needs, backend),
        reference.log_overlap,
        (2, 2, 1, 2, 2, 1),
    )
)
_self_overlap = _entry(
    _OpPair(
        lambda backend, needs, *t: ops.self_overlap_forward(*t, needs, backend),
        lambda backend, needs, grad, t, out: ops.self_overlap_backward(grad, t, out[0], needs, backend),
        reference.self_overlap,
        (2, 2, 1),
    )
)
_cs_divergence = _entry(
    _OpPair(
        lambda backend, needs, *t: ops.cs_divergence_forward(*t, needs, backend),
        lambda backend, needs, grad, t, out: ops.cs_divergence_backward(grad, t, out[1:], needs, backend),
        reference.cs_divergence,
        (2, 2, 1, 2, 2, 1),
    )
)
_pairwise = _entry(
    _OpPair(
        lambda backend, needs, *t: (ops.pairwise_forward(*t, backend), []),
        lambda backend, needs, grad, t, out: ops.pairwise_backward(grad, t, needs, backend),
        reference.pairwise,
        (2, 2, 2, 2),
        at_once="none",
    )
)
_channel_overlap, _full_channel_overlap = (
    _entry(
        _OpPair(
            lambda backend, needs, *t, full=full: (*ops.channel_overlap_forward(*t, full, backend), []),
            lambda backend, needs, grad, t, out, full=full: ops.channel_overlap_backward(
                grad, t, out[::2], needs, full, backend
            ),
            reference.full_channel_overlap if full else reference.channel_overlap,
            (2, 3, 2, 3, 2, 2) if full else (2, 2, 2, 2, 2, 2),
            at_once="none",
        )
    )
    for full in (False, True)
)
_full_overlap_lse = _entry(
    _OpPair(
        lambda backend, needs, *t: (ops.full_overlap_lse_forward(*t, backend), []),
        lambda backend, needs, grad, t, out: ops.full_overlap_lse_backward(grad, t, out[0], needs, backend),
        reference.full_overlap_lse,
        (2, 3, 2, 3, 1),
        at_once="none",
    )
)
_full_self_overlap = _entry(
    _OpPair(
        lambda backend, needs, *t: (*ops.full_self_overlap_forward(*t, backend), []),
        lambda backend, needs, grad, t, out: ops.full_self_overlap_backward(grad, t, out, needs, backend),
        reference.full_self_overlap,
        (2, 3, 1),
        at_once="none",
    )
)
_full_pairwise = _entry(
    _OpPair(
        lambda backend, needs, *t: (ops.full_pairwise_forward(*t, backend), []),
        lambda backend, needs, grad, t, out: ops.full_pairwise_backward(grad, t, needs, backend),
        reference.full_pairwise,
        (2, 3, 2, 3),
        at_once="none",
    )
)


def overlap_lse(backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """ℓ_i for p_means, p_variances, q_means, q_variances, q_log_weights: value and offset, None if it is zero."""
    return _split(_overlap_lse(backend, *tensors))


def log_overlap(backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """log V(p, q) for p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights: value and offset."""
    return _split(_log_overlap(backend, *tensors))


def self_overlap(backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """log V(p, p) for means, variances, log_weights: value and offset, None if it is zero."""
    return _split(_self_overlap(backend, *tensors))


def cs_divergence(backend: str, *tensors: Tensor | None) -> Tensor:
    """D_CS for p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights."""
    return _cs_divergence(backend, *tensors)[0]


def pairwise(backend: str, *tensors: Tensor | None) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j) for p_means, p_variances, q_means, q_variances."""
    return _pairwise(backend, *tensors)[0]


def channel_overlap(backend: str, *tensors: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """log V of channels for p_means, p_variances, q_means, q_variances and the weights of both: value and offset."""
    return _split(_channel_overlap(backend, *tensors))


def full_channel_overlap(backend: str, *tensors: Tensor) -> Tensor:
    """log V of channels for p_means, p_covariances, q_means, q_covariances and the weights of both."""
    return _full_channel_overlap(backend, *tensors)[0]


def full_overlap_lse(backend: str, *tensors: Tensor) -> Tensor:
    """ℓ_i for p_means, p_covariances, q_means, q_covariances, q_log_weights."""
    return _full_overlap_lse(backend, *tensors)[0]


def full_self_overlap(backend: str, *tensors: Tensor) -> Tensor:
    """log V(p, p) for means, covariances, log_weights."""
    return _full_self_overlap(backend, *tensors)[0]


def full_pairwise(backend: str, *tensors: Tensor) -> Tensor:
    """log N(μ_i; ν_j, S_i + T_j) for p_means, p_covariances, q_means, q_covariances."""
    return _full_pairwise(backend, *tensors)[0]


def _split(outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return outputs[0], outputs[1] if len(outputs) > 1 else None
