"""The operators as torch sees them: opaque calls, each with a schema and a fake made from :mod:`csdiv.operators`.

An operator chooses its backend when it runs, on real tensors, from ``backend`` and the device. It knows no gradients:
:mod:`csdiv.autograd` pairs ``FORWARD`` and ``BACKWARD`` up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import backends, channels, transforms
from csdiv.backends.arrays import empty_output
from csdiv.backends.base import Tensors
from csdiv.operators import OPERATORS, Operator
from csdiv.shapes import broadcast

_library = torch.library.Library("csdiv", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers ``function`` as the operator ``schema``, and ``fake`` for its shapes."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"csdiv::{name}", fake, lib=_library)
    return getattr(torch.ops.csdiv, name).default


def _parameters(operator: Operator) -> str:
    """Weights may be left out, but for full covariances and channels; and what the table says."""
    optional = {other.name for other in operator.others if other.optional}
    if not (operator.full or operator.channels):
        optional |= {"p_log_weights", "q_log_weights"}
    return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in operator.names)


def _outputs_like(operator: Operator, tensors: Tensors) -> list[Tensor]:
    shapes = {
        name: t.shape[: t.ndim - event]
        for name, event, t in zip(operator.names, operator.event_dims, tensors, strict=True)
        if t is not None
    }
    q = len(operator.p) if operator.q else 0
    sizes = {"N": tensors[0].shape[-2], "M": tensors[q].shape[-2]}
    if operator.channels:
        sizes |= {"C": tensors[q - 1].shape[-2], "E": tensors[-1].shape[-2]}
    outputs = []
    for output in operator.outputs:
        batch = broadcast(*(shape for name, shape in shapes.items() if name != output.without))
        outputs.append(empty_output(output, tensors[0], batch, **sizes))
    return outputs


def _gradients_like(tensors: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


def _define_forward(operator: Operator) -> Any:
    """(*tensors, needs, backend) -> (*outputs, gradients); no needs and no gradients if none come with the values."""
    name, count, at_once = operator.name, len(operator.names), operator.at_once != "nothing"

    def forward(*arguments: Any) -> Any:
        tensors, needs, backend = arguments[:count], arguments[count], arguments[-1]
        chosen = backends.resolve(backend, tensors[0].device, name)
        if operator.channels:
            return channels.forward(chosen, operator, tensors)
        outputs, grads = chosen.forward(name, tensors, needs if at_once else [False] * count)
        return (*outputs, grads) if at_once else outputs[0] if len(outputs) == 1 else tuple(outputs)

    def fake(*arguments: Any) -> Any:
        outputs = _outputs_like(operator, arguments[:count])
        if at_once:
            return *outputs, _gradients_like(arguments[:count], arguments[count])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    results = ["Tensor"] * len(operator.outputs) + ["Tensor[]"] * at_once
    returns = results[0] if len(results) == 1 else f"({', '.join(results)})"
    schema = f"{name}_forward({_parameters(operator)}, {'bool[] needs, ' * at_once}str backend) -> {returns}"
    return _define(schema, forward, fake)


def _resolved(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.clone() if t._is_zerotensor() else t.resolve_neg()


def _define_backward(operator: Operator) -> Any:
    name = operator.name

    def backward(
        grad: Tensor, outputs: list[Tensor], tensors: list[Tensor | None], needs: list[bool], backend: str
    ) -> list[Tensor]:
        # torch makes tensors of what stands for others, negatives and zeros, but not in lists.
        tensors, outputs = [_resolved(t) for t in tensors], [t.resolve_neg() for t in outputs]
        chosen = backends.resolve(backend, grad.device, name)
        if operator.channels:
            return channels.backward(chosen, operator, grad, tensors, outputs, needs)
        return chosen.backward(name, grad, tensors, outputs, needs)

    schema = f"{name}_backward(Tensor grad, Tensor[] outputs, Tensor?[] tensors, bool[] needs, str backend) -> Tensor[]"
    return _define(schema, backward, lambda grad, outputs, tensors, needs, backend: _gradients_like(tensors, needs))


def _define_assign(operator: Operator) -> Any:
    def assign(*arguments: Any) -> Tensor:
        *tensors, backend = arguments
        return backends.resolve(backend, tensors[0].device, operator.name).assign(operator.name, tensors)

    schema = f"{operator.name}({_parameters(operator)}, str backend) -> Tensor"
    return _define(schema, assign, lambda *arguments: _outputs_like(operator, arguments[:-1])[0])


_ASSIGN = ("assign", "full_assign", "factored_assign")
ASSIGN = {name: _define_assign(OPERATORS[name]) for name in _ASSIGN}
"""(*tensors, backend) -> indices."""
FORWARD = {name: _define_forward(operator) for name, operator in OPERATORS.items() if name not in _ASSIGN}
BACKWARD = {name: _define_backward(operator) for name, operator in OPERATORS.items() if name not in _ASSIGN}
"""(grad, saved outputs, tensors, needs, backend) -> gradients where needed."""


def run_forward(
    name: str, tensors: Tensors, needs: list[bool], backend: str
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The outputs of an operator, and the gradients that come with the values where they are needed."""
    if not (OPERATORS[name].channels or transforms.watched(tensors)):
        return backends.resolve(backend, tensors[0].device, name).forward(name, tensors, needs)
    if OPERATORS[name].at_once != "nothing":
        *outputs, grads = FORWARD[name](*tensors, needs, backend)
        return outputs, grads
    found = FORWARD[name](*tensors, backend)
    return (found,) if isinstance(found, Tensor) else found, ()


def run_backward(
    name: str, grad: Tensor, outputs: list[Tensor], tensors: Tensors, needs: list[bool], backend: str
) -> Sequence[Tensor]:
    """The gradients of Σ grad · value to the tensors that need one; ``outputs`` are those that are saved."""
    if not (OPERATORS[name].channels or transforms.watched((grad, *tensors))):
        return backends.resolve(backend, grad.device, name).backward(name, grad, tensors, outputs, needs)
    return BACKWARD[name](grad, outputs, tensors, needs, backend)
