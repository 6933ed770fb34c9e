"""Torch tensors as the native kernels read them: contiguous float32 or float64 arrays of full shape, (items, K, D).

Structure, strides and batch dimensions are resolved here, in O((N + M) D) memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csdiv.backends.reference import Tensors


class Side(NamedTuple):
    """One side as the kernels read it; the tensors are held so that their memory outlives the call."""

    means: Tensor  # (*own batch, K, D) contiguous
    variances: Tensor  # (*own batch, K, D) contiguous; of a full side covariances, (*own batch, K, D, D)
    log_weights: Tensor | None  # (*own batch, K) contiguous; None: zeros
    own: torch.Size
    same_dims: bool = False  # a variance for each component, whatever the dimension
    same_components: bool = False  # variances that all components of all items have
    tied: bool = False  # variances that all components of an item have


def make_side(means: Tensor, variances: Tensor, log_weights: Tensor | None = None) -> Side:
    own = _own_batch(means, variances, log_weights)
    shape = own + means.shape[-2:]
    if log_weights is not None:
        log_weights = _filled(log_weights, shape[:-1])
    same = (variances.shape[-1] == 1, variances.shape[:-1].numel() == 1, variances.shape[-2] == 1)
    return Side(_filled(means, shape), _filled(variances, shape), log_weights, own, *same)


def make_full_side(means: Tensor, covariances: Tensor, log_weights: Tensor | None = None) -> Side:
    own = _own_batch(means, covariances[..., 0], log_weights)
    shape = own + means.shape[-2:]
    if log_weights is not None:
        log_weights = _filled(log_weights, shape[:-1])
    return Side(_filled(means, shape), _filled(covariances, shape + shape[-1:]), log_weights, own)


def make_points(means: Tensor) -> Side:
    """Components of zero variance: an empty tensor, whose pointer is 0, in place of one."""
    return Side(means.contiguous(), means.new_empty(0), None, means.shape[:-2])


def _filled(t: Tensor, shape: torch.Size) -> Tensor:
    """``t`` as a contiguous array of the full shape; ``t`` itself if it is one."""
    return t if t.shape == shape and t.is_contiguous() else t.expand(shape).contiguous()


def _own_batch(means: Tensor, variances: Tensor, log_weights: Tensor | None) -> torch.Size:
    own = means.shape[:-2]
    if variances.shape[:-2] == own and (log_weights is None or log_weights.shape[:-1] == own):
        return own
    shapes = [own, variances.shape[:-2]]
    return torch.broadcast_shapes(*shapes, *([] if log_weights is None else [log_weights.shape[:-1]]))


class Pair:
    """p against q: the arguments that every kernel on a pair shares."""

    def __init__(self, p: Side, q: Side) -> None:
        self.p, self.q = p, q
        self.batch = p.own if p.own == q.own else torch.broadcast_shapes(p.own, q.own)
        self.n, self.m = p.means.shape[-2], q.means.shape[-2]
        self.indices = [_batch_index(side.own, self.batch, p.means.device) for side in (p, q)]

    def arguments(self) -> tuple[object, ...]:
        means = self.p.means
        sides = map(pointers, (self.p, self.q), self.indices)
        return (means.itemsize, self.batch.numel(), means.shape[-1], *sides)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.p.means.new_empty((*self.batch, *shape), dtype=dtype)


def _batch_index(own: torch.Size, batch: torch.Size, device: torch.device) -> Tensor | None:
    """Which item of a side each problem uses; None where that is plain: its own, or the only one."""
    if own == batch or own.numel() == 1 or own.numel() == batch.numel():
        return None
    return torch.arange(own.numel(), device=device).view(own).expand(batch).reshape(-1)


def flattened(pair: Pair) -> Pair:
    """A batch of p against one q as one problem: rows of different problems share tiles; outputs keep their layout."""
    p, q = pair.p, pair.q
    if p.own != pair.batch or q.own.numel() != 1 or len(pair.batch) == 0:
        return pair
    return Pair(_one_item(p, p.own.numel() * p.means.shape[-2]), _one_item(q, q.means.shape[-2]))


def _one_item(side: Side, n: int) -> Side:
    """All components of all items, n, as those of one."""
    batch = len(side.own)
    means, variances = (t.reshape(n, *t.shape[batch + 1 :]) for t in (side.means, side.variances))
    log_weights = None if side.log_weights is None else side.log_weights.reshape(n)
    tied = side.same_components if side.own.numel() > 1 else side.tied
    return Side(means, variances, log_weights, torch.Size(), side.same_dims, side.same_components, tied)


def pointers(side: Side, index: Tensor | None = None) -> tuple[int, ...]:
    return (
        side.means.data_ptr(),
        side.variances.data_ptr(),
        0 if side.log_weights is None else side.log_weights.data_ptr(),
        0 if index is None else index.data_ptr(),
        side.own.numel(),
        side.means.shape[-2],
        side.same_dims,
        side.same_components,
    )


class Gradients:
    """Gradient arrays of one side, allocated where wanted and summed to the shape of the tensors."""

    def __init__(self, side: Side, tensors: Tensors, needs: Sequence[bool]) -> None:
        self._tensors = tensors
        arrays = (side.means, side.variances)
        self._arrays = [torch.empty_like(a) if need else None for a, need in zip(arrays, needs[:2], strict=True)]
        if len(needs) > 2:
            self._arrays.append(side.means.new_empty(side.means.shape[:-1]) if needs[2] else None)

    def pointers(self) -> tuple[int, ...]:
        """(means, variances, log_weights), 0 where not wanted."""
        pointers = [0 if a is None else a.data_ptr() for a in self._arrays]
        return (*pointers, *(0,) * (3 - len(pointers)))

    def results(self) -> list[Tensor]:
        wanted = [(a, t) for a, t in zip(self._arrays, self._tensors, strict=True) if a is not None]
        return [a if a.shape == t.shape else a.sum_to_size(t.shape) for a, t in wanted]
