"""D_CS of components from a mixture for backends that have its parts: rows, self terms, and torch for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csdiv import reference
from csdiv.backends.arrays import of_own
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import OPERATORS
from csdiv.reference import Components
from csdiv.shapes import broadcast
from csdiv.transforms import autograd_enabled


class Composed(Backend):
    """The operators "regularizer" and "component_divergence", equation (20), made of "overlap_lse" and "self_overlap".

    Gradients of variances are those of rows, carried through the few operations of :mod:`csdiv.reference` by torch.
    """

    composed = frozenset()

    def __init__(self, parts: Backend) -> None:
        self.parts = parts

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        if any(needs):
            raise NotImplementedError(f"{name}: gradients come from the backward pass alone")
        p, q, own = _sides(name, tensors)
        (row_lse, offset), _ = self.parts.forward("overlap_lse", [*p, *q], [False] * 5)
        known = tensors[5]
        if known is None:
            value, self_offset = self.parts.forward("self_overlap", q, [False] * 3)[0]
            known = value + self_offset
        part, row_lse = reference.own_part(own, known, p[0].shape[-1]), row_lse + offset
        value = part - row_lse
        outputs = (value, row_lse - _left_out(part), known.expand(value.shape[:-1]))
        dtypes = (output.dtype or tensors[0].dtype for output in OPERATORS[name].outputs)
        return [t.to(dtype).contiguous() for t, dtype in zip(outputs, dtypes, strict=True)], []

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        needs = [need and t is not None for need, t in zip(needs, tensors, strict=True)]
        if grad.numel() == 0:
            return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
        with autograd_enabled():
            leaves = [None if t is None else t.detach() for t in tensors]
            spread = tensors[1].detach().requires_grad_(needs[1])
            p, q, own = _sides(name, [leaves[0], spread, *leaves[2:]])
        variances = p[1].detach()
        part = reference.own_part(own.detach(), outputs[1], p[0].shape[-1])
        found = self._of_rows([p[0], variances, *q], grad, outputs[0] + _left_out(part), needs[:5])
        if needs[1]:
            slope = found[1].to(variances.dtype)
            if name == "regularizer":
                slope = torch.where(variances == 0.0, 0.0, slope)
            upstream = grad.double().sum_to_size(own.shape)
            (found[1],) = torch.autograd.grad([p[1], own], spread, [slope, upstream])
        halves = 0.5 * grad.sum(-1, dtype=torch.float64)
        if tensors[5] is not None:
            found[5] = halves
        else:
            for k, g in self._of_self(q, halves, outputs[1], needs[2:5]).items():
                found[2 + k] = found[2 + k] + g
        return [found[k].sum_to_size(t.shape).to(t.dtype) for k, t in enumerate(tensors) if needs[k]]

    def _of_rows(self, tensors: Tensors, grad: Tensor, row_lse: Tensor, needs: Sequence[bool]) -> dict[int, Tensor]:
        """Gradients of −Σ grad · ℓ_i, by the tensor."""
        if not any(needs):
            return {}
        shape = (*_batch(tensors), grad.shape[-1])
        dtype = tensors[0].dtype
        saved = self.parts.saved_outputs("overlap_lse", tensors, of_own(row_lse, shape).contiguous())
        grads = self.parts.backward("overlap_lse", -grad.sum_to_size(shape).to(dtype), tensors, saved, needs)
        return _by_tensor(grads, needs)

    def _of_self(self, q: Tensors, grad: Tensor, values: Tensor, needs: Sequence[bool]) -> dict[int, Tensor]:
        """Gradients of Σ grad · log V(q, q)."""
        if not any(needs):
            return {}
        own = _batch(q)
        saved = self.parts.saved_outputs("self_overlap", q, of_own(values, own).contiguous())
        grads = self.parts.backward("self_overlap", grad.sum_to_size(own), q, saved, needs)
        return _by_tensor(grads, needs)

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        return self.parts.assign(name, tensors)


def _sides(name: str, tensors: Tensors) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    """Means and variances of p, the tensors of q, and the own terms of p's components."""
    codes = Components(**dict(zip(OPERATORS[name].p, tensors[:2], strict=True)))
    p, q, own = reference.with_own_terms(codes, Components(tensors[2], tensors[3], log_weights=tensors[4]))
    assert p.variances is not None
    return [p.means, p.variances], [q.means, q.variances, q.log_weights], own


def _left_out(part: Tensor) -> Tensor:
    """What the output "row_lse" leaves out, so that rounding it costs least: all of D_CS but itself."""
    return torch.where(part.isfinite(), part, 0.0)


def _batch(tensors: Tensors) -> torch.Size:
    """The batch shape of means, variances and weights: of one side, or of both."""
    event_dims = OPERATORS["self_overlap" if len(tensors) == 3 else "overlap_lse"].event_dims
    return broadcast(*(t.shape[: t.ndim - e] for t, e in zip(tensors, event_dims, strict=True) if t is not None))


def _by_tensor(grads: Sequence[Tensor], needs: Sequence[bool]) -> dict[int, Tensor]:
    return dict(zip((k for k, need in enumerate(needs) if need), grads, strict=True))
