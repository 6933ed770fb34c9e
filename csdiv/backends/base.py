"""What a backend offers, and the tensors that it is given."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import transforms
from csdiv.operators import OPERATORS

Tensors = Sequence[Any]
"""Tensors in the order of the operator, None for weights that were not given."""


class Backend(abc.ABC):
    """Computes the operators of :mod:`csdiv.operators` on tensors of one kind of device.

    Tensors are means (*batch, K, D), variances (*batch, K or 1, D or 1) and log weights (*batch, K), or None (uniform),
    of one dtype (float32 or float64) and device, on any strides; their batch dimensions broadcast. Operators named
    ``full_…`` take covariances (*batch, K or 1, D, D) in place of variances, symmetric, with D up to
    ``csdiv.backends.MAX_FULL_DIM``, and weights that are always given; all is float64. NaN is the value where a sum of
    two covariances is not positive definite. Operators named ``factored_…`` take points on one side, their means alone,
    and on the other lower triangular factors (*batch, K or 1, D, D) of the covariances.

    A logarithm comes as a value and an offset, whose sum it is: a backend moves what cancels in D_CS, the scale of
    log c and constants, to the offset, where it is not rounded to float32.
    """

    lacks: frozenset[str] = frozenset()
    """Operators that it does not compute: "auto" takes the reference for them."""

    composed: frozenset[str] = frozenset({"regularizer", "component_divergence"})
    """Operators that are made of its others, see :class:`csdiv.backends.composed.Composed`. A backend that computes
    them itself has none of them here."""

    @functools.cached_property
    def loaded(self) -> set[torch.device]:
        """Devices that :func:`csdiv.warmup` was called for."""
        return set()

    @abc.abstractmethod
    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of an operator, and the gradients of the sum of its values to the tensors that need one.

        ``needs`` holds only False unless the operator's ``at_once`` is "scalars", and every tensor that needs a
        gradient has all batch dimensions, or "rows", and tensors are on the CPU.
        """

    @abc.abstractmethod
    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of Σ grad · value, in the shapes of the tensors that need one.

        ``outputs`` are those of the forward pass that the operator saves.
        """

    @abc.abstractmethod
    def assign(self, name: str, tensors: Tensors) -> Tensor:
        """argmax_j of log b_j + log N(μ_i; ν_j, S_i + T_j), (*batch, N) int64; the lowest j of equal ones.

        ``name`` is "assign", "full_assign" or "factored_assign".
        """

    def scaled(
        self, grads: Sequence[Tensor], grad: Tensor, *, one_factor: bool, in_place: bool = False
    ) -> list[Tensor] | None:
        """The gradients that came with the values, times the upstream gradient ``grad`` (*batch), or, with
        ``one_factor``, the one value that ``grad`` consists of. ``in_place``: they may be changed.

        None where that is not possible: there are several values, or a gradient overflowed whose product with
        something below 1 may not, or is 0. The latter is known on CPUs alone: elsewhere one would have to wait for it.
        """
        if one_factor:
            common = _common_value(grad)
            if common is None:
                return None
            grad = common
        if not _can_be_scaled(grads, grad):
            return None
        if grad.ndim == 0:
            found = list(torch._foreach_mul(list(grads), grad))  # one call, where each costs more than what it computes
            return found if grad.device.type == "cpu" else [torch.where(grad == 0.0, 0.0, g) for g in found]
        upstream = [unsqueezed(grad, g) for g in grads]
        return [torch.where(u == 0.0, 0.0, u * g) for u, g in zip(upstream, grads, strict=True)]

    def saved_outputs(self, name: str, tensors: Tensors, value: Tensor) -> list[Tensor]:
        """The outputs that "overlap_lse" or "self_overlap" saves, for an operator that is made of them.

        ``value`` is the whole logarithm, float64. A backend whose backward pass takes that, with an offset of 0, spares
        itself this second forward pass.
        """
        outputs, _ = self.forward(name, tensors, [False] * len(tensors))
        return [outputs[k] for k in OPERATORS[name].saved]

    def elements_of_pair(self, elements: int) -> int:
        """Temporary numbers that "pairwise" takes for a pair whose covariances have ``elements`` each."""
        return 1


def unsqueezed(grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` (*batch) so that it broadcasts to ``like`` (*batch, ...), in its dtype."""
    return grad.to(like.dtype).reshape(grad.shape + (1,) * (like.ndim - grad.ndim))


def _can_be_scaled(grads: Sequence[Tensor], grad: Tensor) -> bool:
    if grad.device.type != "cpu" or not transforms.has_values(grad):
        return True
    if abs(grad.item()) >= 1.0 if grad.ndim == 0 else bool((grad.abs() >= 1.0).all()):
        return True
    return all(math.isfinite(float(g.sum())) for g in grads)


def _common_value(grad: Tensor) -> Tensor | None:
    """The one value that ``grad`` consists of, None where there are several or it is 0 or NaN."""
    if grad.numel() == 0:
        return None
    common = grad[(0,) * grad.ndim]
    return common if common != 0 and torch.equal(grad, common.expand_as(grad)) else None
