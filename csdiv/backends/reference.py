"""The reference as a backend: :mod:`csdiv.reference`, differentiated by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import reference
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import OPERATORS
from csdiv.reference import Components
from csdiv.transforms import autograd_enabled


def formula(name: str, tensors: Tensors) -> Tensor:
    """The value of an operator as a differentiable function of its tensors: gradients of any order."""
    return reference.FORMULAS[name.removeprefix("full_").removeprefix("factored_")](*_operands(name, tensors))


def _operands(name: str, tensors: Tensors) -> list[Any]:
    """p and q, where there is one, as Components, and the tensors of neither."""
    operator, remaining = OPERATORS[name], iter(tensors)
    sides = (kinds for kinds in (operator.p, operator.q) if kinds)
    return [*[Components(**{kind: next(remaining) for kind in kinds}) for kinds in sides], *remaining]


class Reference(Backend):
    composed = frozenset()

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        operands = _operands(name, tensors)
        p, q = operands[:2] if OPERATORS[name].q else operands[:1] * 2
        overlaps: tuple[Tensor, ...] = ()
        if name == "cs_divergence":
            pairs = ((p, q), (p, p), (q, q))
            overlaps = torch.broadcast_tensors(*(reference.log_overlap(*pair) for pair in pairs))
            value = 0.5 * (overlaps[1] + overlaps[2]) - overlaps[0]
        else:
            value = formula(name, tensors)
        first, *rest = OPERATORS[name].outputs
        count = len(OPERATORS[name].others)
        outputs = [value.to(first.dtype or value.dtype).contiguous()]
        for output in rest:
            if output.name == "offset":
                extra = value.new_zeros(*value.shape[:-1], 1) if output.sizes == "1" else torch.zeros_like(value)
            elif output.name == "row_lse":
                extra = reference.ROW_LSE.get(name, reference.overlap_lse)(p, q, *tensors[len(tensors) - count :])
            elif output.name == "self_overlap":
                known = reference.log_overlap(q, q) if tensors[-1] is None else tensors[-1]
                extra = known.expand(value.shape[:-1]).clone()
            else:
                extra = torch.stack(overlaps, -1)
            outputs.append(extra.to(output.dtype or tensors[0].dtype))
        return outputs, self.backward(name, torch.ones_like(value), tensors, [], needs)

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        with autograd_enabled():
            leaves = [
                None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)
            ]
            wanted = [t for t in leaves if t is not None and t.requires_grad]
            if not wanted:
                return []
            value = formula(name, leaves)
            return [g.contiguous() for g in torch.autograd.grad(value, wanted, grad.to(value.dtype))]

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        return formula(name, tensors)

    def elements_of_pair(self, elements: int) -> int:
        return elements


backend = Reference()
