"""log V of every pair of channels in one pass over the pairs of components, on the pairwise functions of any backend.

Equations (16) and (19) of docs/math.md.

Logits of a tile of rows come from the backend, in the dtype of the mixtures; what follows is float64, where an
exponential keeps 700 nats below the largest and a matrix product is one, whatever precision torch was told to take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csdiv import reference
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import Operator
from csdiv.shapes import broadcast

TILE, TILE_ROWS = 2**19, 32
"""Pairs in a tile on CPUs, so that it stays in the cache, and rows where there are more columns than that."""
BLOCK = 64
"""Terms that one matrix product adds: so few that BLAS does not cut the sum by the number of threads."""


class Pairwise:
    """A backend's logits of pairs."""

    def __init__(self, backend: Backend, operator: Operator, dim: int) -> None:
        self._backend, self._name = backend, "full_pairwise" if operator.full else "pairwise"
        self.axis = -3 if operator.full else -2  # the components of a spread: covariances or variances
        self.elements = backend.elements_of_pair(dim**2 if operator.full else dim)

    def forward(self, sides: Tensors) -> Tensor:
        """(p_means, p_spread, q_means, q_spread) -> (*batch, N, M)."""
        return self._backend.forward(self._name, sides, [False] * 4)[0][0]

    def backward(self, grad: Tensor, sides: Tensors, needs: list[bool]) -> list[Tensor]:
        return self._backend.backward(self._name, grad, sides, [], needs)


def forward(backend: Backend, operator: Operator, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """log V: value and offset, both (*batch, C, C'); row sums (*batch, N, C') for the backward pass; all float64."""
    pairwise = Pairwise(backend, operator, tensors[0].shape[-1])
    sides, a, b, unit = _prepared(pairwise, tensors)
    scratch = Scratch()
    pieces = [
        log_product(pairwise.forward(_tile(pairwise, sides, *tile)), b, scratch) for tile in _tiles(pairwise, sides, b)
    ]
    row_lse = torch.cat(pieces, -2)
    value = log_product(row_lse.mT, a).mT.contiguous()
    return value, torch.zeros_like(value) - sides[0].shape[-1] * unit.log(), row_lse


def backward(
    backend: Backend, operator: Operator, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """Gradients of Σ grad · log V, equation (19). ``outputs`` is the forward's value and row sums."""
    pairwise = Pairwise(backend, operator, tensors[0].shape[-1])
    sides, a, b, unit = _prepared(pairwise, tensors)
    value, row_lse = outputs
    side_needs = [*needs[:2], *needs[3:5]]
    of_sides = any(side_needs)
    grad_row_lse, grad_a = log_product_gradients(
        row_lse.mT, a, value.mT, grad.double().mT, of_sides or needs[5], needs[2]
    )
    sums = [t.new_zeros(t.shape, dtype=torch.float64) if need else None for t, need in zip(tensors, needs, strict=True)]
    if sums[2] is not None:
        sums[2] += grad_a.sum_to_size(a.shape)
    if of_sides or needs[5]:
        grad_row_lse, scratch = grad_row_lse.sum_to_size(row_lse.mT.shape).mT, Scratch()
        for start, length in _tiles(pairwise, sides, b):
            tile = _tile(pairwise, sides, start, length)
            logits = pairwise.forward(tile)
            own_row_lse, own_grad = (t.narrow(-2, start, length) for t in (row_lse, grad_row_lse))
            grad_logits, grad_b = log_product_gradients(logits, b, own_row_lse, own_grad, of_sides, needs[5], scratch)
            if sums[5] is not None:
                sums[5] += grad_b.sum_to_size(b.shape)
            if of_sides:
                weights = grad_logits.sum_to_size(logits.shape).to(logits.dtype)
                found = iter(pairwise.backward(weights, tile, side_needs))
                for whole in _tile(pairwise, [*sums[:2], *sums[3:5]], start, length):
                    if whole is not None:
                        whole += next(found)
    units = (unit, unit**2, torch.ones_like(unit)) * 2
    return [(s / u).to(t.dtype) for s, u, t in zip(sums, units, tensors, strict=True) if s is not None]


class Scratch:
    """Memory that tiles of one shape after the other write to: fresh pages would take longer than what is written."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A float64 array on the device of ``like``, with what was written under this name before."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape:
            found = self._arrays[name] = like.new_empty(shape, dtype=torch.float64)
        return found


def log_product(x: Tensor, y: Tensor, scratch: Scratch | None = None) -> Tensor:
    """log Σ_k exp(x_nk + y_ck), (*batch, n, c) float64, for x (*batch, n, k) and float64 weights y (*batch, c, k).

    A weight of −inf counts nothing, whatever x. Sums that underflow, though their terms may not, are taken anew.
    """
    scratch = scratch or Scratch()
    (e, x_max), (w, y_max) = _exponentials(x, scratch), _exponentials(y, Scratch())
    total = _product(e, w.mT)
    y_max = y_max.mT
    empty = (y_max == -math.inf) | (x_max == -math.inf) & ~y_max.isnan()
    inexact = ~(total >= _smallest(e)) & ~empty
    value = torch.where(empty | inexact, -math.inf, total.log() + x_max + y_max)
    for c in _channels_with(inexact):
        weight = y[..., c : c + 1, :]
        exact = reference.logsumexp(reference.weighted(x, weight), -1)
        value[..., c] = torch.where(inexact[..., c], exact, value[..., c])
    return value


def log_product_gradients(
    x: Tensor, y: Tensor, value: Tensor, grad: Tensor, of_x: bool, of_y: bool, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ grad · log_product(x, y), those that are wanted, float64 and with the batch of both.

    The share of a term, exp(x + y − value), is the product of its own two exponentials and of a factor for n and c.
    Where that is too large the share is taken as a whole.
    """
    scratch = scratch or Scratch()
    (e, x_max), (w, y_max) = _exponentials(x, scratch), _exponentials(y, Scratch())
    grad = torch.where(value.isinf(), 0.0, grad)
    factor = (x_max + y_max.mT - value).exp()
    inexact = ~(factor * _smallest(e) <= 1.0) & (grad != 0.0)
    scaled = torch.where(inexact | (grad == 0.0), 0.0, grad * factor)
    grad_x, grad_y = x, y  # not wanted
    if of_x:
        grad_x = scratch.array("grad", x, (*scaled.shape[:-1], x.shape[-1]))
        torch.matmul(scaled, w, out=grad_x).mul_(e)
    if of_y:
        grad_y = _product(scaled.mT, e).mul_(w)
    for c in _channels_with(inexact):
        weight, (own, upstream, taken) = y[..., c : c + 1, :], (t[..., c : c + 1] for t in (value, grad, inexact))
        shares = torch.where(taken & (weight != -math.inf), upstream * (x + weight - own).exp(), 0.0)
        if of_x:
            grad_x += shares
        if of_y:
            grad_y[..., c, :] += shares.sum(-2)
    return grad_x, grad_y


def _exponentials(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """exp(x − largest) of each row, zero where the largest is not finite; and the largest; float64."""
    largest = x.amax(-1, keepdim=True).double()
    finite = largest.isfinite()
    result = scratch.array("exponentials", x, x.shape).copy_(x).sub_(torch.where(finite, largest, math.inf)).exp_()
    if _may_hold(~finite):
        result.masked_fill_(~finite, 0.0)  # of a row with NaN or +inf
    return result, largest


def _smallest(x: Tensor) -> float:
    """What a sum of exponentials must reach for terms that underflowed to be below its last digit."""
    info = torch.finfo(x.dtype)
    return x.shape[-1] * info.tiny / info.eps


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a b, ``BLOCK`` terms of a sum at a time."""
    whole = a.shape[-1] // BLOCK * BLOCK
    result = a[..., whole:] @ b[..., whole:, :]
    if whole:
        a = a[..., :whole].unflatten(-1, (-1, BLOCK)).movedim(-2, -3)
        b = b[..., :whole, :].unflatten(-2, (-1, BLOCK))
        at_once = max(1, TILE // max(1, result.numel()))
        for some, others in zip(a.split(at_once, -3), b.split(at_once, -3), strict=True):
            result += (some @ others).sum(-3)
    return result


def _channels_with(mask: Tensor) -> Iterator[int]:
    """The channels c for which any of ``mask`` (*batch, n, c) may hold."""
    return (c for c in range(mask.shape[-1] if _may_hold(mask) else 0) if _may_hold(mask[..., c]))


def _may_hold(mask: Tensor) -> bool:
    """Whether any of ``mask`` holds; True while a CUDA graph is captured, where nobody may ask."""
    return (mask.is_cuda and torch.cuda.is_current_stream_capturing()) or bool(mask.any())


def _prepared(pairwise: Pairwise, tensors: Tensors) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Both sides in units of length ``unit``, their weights in float64 and NaN for +inf, and ``unit``.

    Components without weight in any channel are N(0, I).
    """
    prepared = []
    for means, spread, channels in (tensors[:3], tensors[3:]):
        present = (channels != -math.inf).any(-2)
        own = 1.0 if pairwise.axis == -2 else torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        prepared.append(torch.where(reference.somewhere(present, means.shape[:-1]).unsqueeze(-1), means, 0.0))
        if spread.shape[pairwise.axis] == means.shape[-2]:
            kept = reference.somewhere(present, spread.shape[: pairwise.axis + 1])
            spread = torch.where(kept.view(*kept.shape, *(1,) * (-1 - pairwise.axis)), spread, own)
        prepared.append(spread)
    unit = torch.ones((), dtype=torch.float64, device=tensors[0].device)
    if pairwise.axis == -2:
        prepared, unit = _in_units(prepared)
    a, b = (torch.where(t == math.inf, math.nan, t).double() for t in tensors[2::3])
    return prepared, a, b, unit


def _in_units(sides: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Means divided by a power of two near √(4πs), s the middle of the variances, variances by its square; and it.

    Logits of pairs, then, have no large term in common, and float32 rounds what differs. It is 1 where numbers would
    leave the range.
    """
    logs = [t.abs().log2() for t in sides[1::2]]
    middles = [torch.where(t.isfinite(), t, math.nan).nanmean(dtype=torch.float64) for t in logs]
    middle = torch.stack(middles).nanmean() + math.log2(4.0 * math.pi)
    unit = torch.exp2((0.5 * middle).round().nan_to_num(0.0))
    scaled = [t / power for t, power in zip(sides, (unit, unit**2) * 2, strict=True)]
    outside = [((t.abs() > 2.0**100) & whole.isfinite()).any() for t, whole in zip(scaled, sides, strict=True)]
    outside += [
        ((t.abs() < 2.0**-100) & (whole != 0.0)).any() for t, whole in zip(scaled[1::2], sides[1::2], strict=True)
    ]
    fits = ~torch.stack(outside).any()
    return [torch.where(fits, *pair) for pair in zip(scaled, sides, strict=True)], torch.where(fits, unit, 1.0)


def _tiles(pairwise: Pairwise, sides: list[Tensor], b: Tensor) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each tile: a choice of sizes alone."""
    n, m = sides[0].shape[-2], sides[2].shape[-2]
    batch = broadcast(*(t.shape[:-2] for t in (*sides[::2], b)), *_batches(pairwise, sides))
    per_row = max(1, math.prod(batch) * m)
    most = reference.CHUNK_ELEMENTS // pairwise.elements
    tile = min(TILE, most) if b.device.type == "cpu" else most
    length = max(1, tile // per_row, min(TILE_ROWS, most // per_row))
    return ((start, min(length, n - start)) for start in range(0, n, length))


def _batches(pairwise: Pairwise, sides: list[Tensor]) -> Iterator[torch.Size]:
    return (t.shape[: pairwise.axis] for t in sides[1::2])


def _tile(pairwise: Pairwise, sides: Sequence[Tensor | None], start: int, length: int) -> list[Tensor | None]:
    """The tensors of both sides, of p a tile's rows."""
    axes = (-2, pairwise.axis)
    return [*(reference._slice(t, start, length, axis) for t, axis in zip(sides[:2], axes, strict=True)), *sides[2:]]
