"""log V of every pair of channels in one pass over the pairs of components, on the pairwise functions of any backend.

Logits of a tile of rows come from the backend, in the dtype of the mixtures; what follows is float64, where an
exponential keeps 700 nats below the largest and a matrix product is one, whatever precision torch was told to take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from csdiv import reference
from csdiv.backends.reference import Tensors

TILE, TILE_ROWS = 2**18, 32
"""Pairs in a tile on CPUs, so that it stays in the cache, and rows where there are more columns than that."""
BLOCK = 64
"""Terms that one matrix product adds: so few that BLAS does not cut the sum by the number of threads."""


class Pairwise(NamedTuple):
    """A backend's logits of pairs, and what they take."""

    forward: Callable[..., Tensor]  # (p_means, p_spread, q_means, q_spread) -> (*batch, N, M)
    backward: Callable[..., list[Tensor]]  # (grad, these, needs) -> gradients where needed
    axis: int = -2  # the components of a spread: −2 of variances, −3 of covariances
    elements: int = 1  # temporary numbers for a pair


def forward(pairwise: Pairwise, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """log V (*batch, C, C'), and the row sums ℓ (*batch, N, C') for the backward pass; both float64.

    ``tensors``: means and variances, or covariances, of p and of q, then p's channels (*batch, C, N) and q's.
    """
    *sides, a, b = _prepared(pairwise, tensors)
    pieces = [
        log_product(pairwise.forward(*_tile(pairwise, sides, *tile)).double(), b) for tile in _tiles(pairwise, sides, b)
    ]
    rows = torch.cat(pieces, -2)
    return log_product(rows.mT, a).mT.contiguous(), rows


def backward(
    pairwise: Pairwise, grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """Gradients of Σ grad · log V, equation (19). ``saved`` is what the forward gave."""
    *sides, a, b = _prepared(pairwise, tensors)
    value, rows = saved
    of_sides = any(needs[:4])
    grad_rows, grad_a = log_product_gradients(rows.mT, a, value.mT, grad.double().mT, of_sides or needs[5], needs[4])
    sums = [torch.zeros_like(t, dtype=torch.float64) if need else None for t, need in zip(tensors, needs, strict=True)]
    if sums[4] is not None:
        sums[4] += grad_a.sum_to_size(a.shape)
    if of_sides or needs[5]:
        grad_rows = grad_rows.sum_to_size(rows.mT.shape).mT
        for start, length in _tiles(pairwise, sides, b):
            tile = _tile(pairwise, sides, start, length)
            logits = pairwise.forward(*tile)
            own = (t.narrow(-2, start, length) for t in (rows, grad_rows))
            grad_logits, grad_b = log_product_gradients(logits.double(), b, *own, of_sides, needs[5])
            if sums[5] is not None:
                sums[5] += grad_b.sum_to_size(b.shape)
            if of_sides:
                weights = grad_logits.sum_to_size(logits.shape).to(logits.dtype)
                found = iter(pairwise.backward(weights, tile, needs[:4]))
                for whole in _tile(pairwise, sums[:4], start, length):
                    if whole is not None:
                        whole += next(found)
    return [s.to(t.dtype) for s, t in zip(sums, tensors, strict=True) if s is not None]


def log_product(x: Tensor, y: Tensor) -> Tensor:
    """log Σ_k exp(x_nk + y_ck), (*batch, n, c), for float64 x (*batch, n, k) and weights y (*batch, c, k).

    A weight of −inf counts nothing, whatever x. Sums that underflow, though their terms may not, are taken anew.
    """
    (e, x_max), (w, y_max) = _exponentials(x), _exponentials(y)
    total = _product(e, w.mT)
    y_max = y_max.mT
    empty = (y_max == -math.inf) | (x_max == -math.inf) & ~y_max.isnan()
    inexact = ~(total >= _smallest(x)) & ~empty
    value = torch.where(empty | inexact, -math.inf, total.log() + x_max + y_max)
    for c in _channels_with(inexact):
        exact = reference.logsumexp(_weighted(x, y[..., c : c + 1, :]), -1)
        value[..., c] = torch.where(inexact[..., c], exact, value[..., c])
    return value


def log_product_gradients(
    x: Tensor, y: Tensor, value: Tensor, grad: Tensor, of_x: bool, of_y: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ grad · log_product(x, y) where they are wanted, else zero; with the batch of both.

    The share of a term, exp(x + y − value), is the product of three factors: of its own two exponentials, and of one for
    n and c. Where that one is too large the share is taken as a whole.
    """
    (e, x_max), (w, y_max) = _exponentials(x), _exponentials(y)
    grad = torch.where(value == -math.inf, 0.0, grad)
    factor = (x_max + y_max.mT - value).exp()
    inexact = ~(factor * _smallest(x) <= 1.0) & (grad != 0.0)
    scaled = torch.where(inexact | (grad == 0.0), 0.0, grad * factor)
    grad_x = _product(scaled, w).mul_(e) if of_x else torch.zeros_like(x)
    grad_y = _product(scaled.mT, e).mul_(w) if of_y else torch.zeros_like(y)
    for c in _channels_with(inexact):
        shares = (_weighted(x, y[..., c : c + 1, :]) - value[..., c : c + 1]).exp()
        shares = torch.where(inexact[..., c : c + 1], grad[..., c : c + 1] * shares, 0.0)
        if of_x:
            grad_x += shares
        if of_y:
            grad_y[..., c, :] += shares.sum(-2)
    return grad_x, grad_y


def _exponentials(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x − largest) of each row, zero where the largest is not finite; and the largest."""
    largest = x.amax(-1, keepdim=True)
    finite = largest.isfinite()
    result = (x - torch.where(finite, largest, math.inf)).exp_()
    if _may_hold(~finite):
        result = result.masked_fill_(~finite, 0.0)  # of a row with NaN or +inf
    return result, largest


def _weighted(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight == -math.inf, -math.inf, x + weight)


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
        result += (a @ b).sum(-3)
    return result


def _channels_with(mask: Tensor) -> Iterator[int]:
    """The channels c for which any of ``mask`` (*batch, n, c) may hold."""
    return (c for c in range(mask.shape[-1] if _may_hold(mask) else 0) if _may_hold(mask[..., c]))


def _may_hold(mask: Tensor) -> bool:
    """Whether any of ``mask`` holds; True while a CUDA graph is captured, where nobody may ask."""
    return (mask.is_cuda and torch.cuda.is_current_stream_capturing()) or bool(mask.any())


def _prepared(pairwise: Pairwise, tensors: Tensors) -> list[Tensor]:
    """The tensors, weights in float64 and NaN for +inf; components without weight in any channel are N(0, I)."""
    *sides, a, b = tensors
    prepared = []
    for (means, spread), channels in zip((sides[:2], sides[2:]), (a, b), strict=True):
        present = (channels != -math.inf).any(-2)
        own = 1.0 if pairwise.axis == -2 else torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
        prepared.append(torch.where(_somewhere(present, means.shape[:-1]).unsqueeze(-1), means, 0.0))
        if spread.shape[pairwise.axis] == means.shape[-2]:
            kept = _somewhere(present, spread.shape[: pairwise.axis + 1])
            spread = torch.where(kept[(..., *(None,) * (-1 - pairwise.axis))], spread, own)
        prepared.append(spread)
    return [*prepared, *(torch.where(t == math.inf, math.nan, t).double() for t in (a, b))]


def _somewhere(mask: Tensor, shape: torch.Size) -> Tensor:
    """Whether ``mask`` holds anywhere in what ``shape`` leaves out of the batch."""
    return mask.expand(torch.broadcast_shapes(mask.shape, shape)).double().sum_to_size(shape) > 0.0


def _tiles(pairwise: Pairwise, sides: list[Tensor], b: Tensor) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each tile: a choice of sizes alone."""
    n, m = sides[0].shape[-2], sides[2].shape[-2]
    batch = torch.broadcast_shapes(*(t.shape[:-2] for t in (*sides[::2], b)), *_batches(pairwise, sides))
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
