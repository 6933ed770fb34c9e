"""log V of every pair of channels in one pass over the pairs of components, on the pairwise functions of any backend.

Equations (16) and (19) of docs/math.md.

Logits of a tile of rows come from the backend, in the dtype of the mixtures; what follows is float64, where an
exponential keeps 700 nats below the largest and a matrix product is one, whatever precision torch was told to take.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from csdiv import reference
from csdiv.backends.base import Backend, Tensors
from csdiv.operators import Operator
from csdiv.shapes import broadcast

TILE, TILE_ROWS = 2**19, 32
"""Pairs in a tile on CPUs, so that it stays in the cache, and rows where there are more columns than that."""
TRIANGLE_TILES = 8
"""Tiles at least, of no fewer than 4 · ``TILE_ROWS`` rows, where pairs above the diagonal are enough."""
BLOCK = 128
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
    """log V: value and offset, both (*batch, C, C'); row sums (*batch, N, C') for the backward pass; all float64.

    Without q, rows sum the pairs i ≤ j alone, half of those i = j.
    """
    pairwise, symmetric = Pairwise(backend, operator, tensors[0].shape[-1]), not operator.q
    sides, a, b, unit = _prepared(pairwise, tensors)
    scratch, pieces = Scratch(), []
    for start, length in _tiles(pairwise, sides, b, symmetric):
        logits = pairwise.forward(_tile(pairwise, sides, start, length, symmetric))
        pieces.append(log_product(*_upper(logits, b, symmetric), scratch))
    row_lse = torch.cat(pieces, -2)
    value = log_product(row_lse.mT, a).mT
    if symmetric:
        value = torch.logaddexp(value, value.mT)
    return value.contiguous(), (-sides[0].shape[-1] * unit.log()).expand(value.shape).contiguous(), row_lse


def backward(
    backend: Backend, operator: Operator, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """Gradients of Σ grad · log V, equation (19). ``outputs`` is the forward's value and row sums."""
    pairwise, symmetric = Pairwise(backend, operator, tensors[0].shape[-1]), not operator.q
    sides, a, b, unit = _prepared(pairwise, tensors)
    value, row_lse = outputs
    if symmetric:  # each tensor has the gradients of both sides
        grad, tensors, needs = grad + grad.mT, [*tensors, *tensors], [*needs, *needs]
    side_needs = [*needs[:2], *needs[3:5]]
    of_sides = any(side_needs)
    grad_row_lse, grad_a = log_product_gradients(
        row_lse.mT, a, value.mT, grad.double().mT, of_sides or needs[5], needs[2]
    )
    sums = [t.new_zeros(t.shape, dtype=torch.float64) if need else None for t, need in zip(tensors, needs, strict=True)]
    if symmetric:
        sums[3:] = sums[:3]
    if sums[2] is not None:
        sums[2] += grad_a.sum_to_size(a.shape)
    if of_sides or needs[5]:
        grad_row_lse, scratch = grad_row_lse.sum_to_size(row_lse.mT.shape).mT, Scratch()
        for start, length in _tiles(pairwise, sides, b, symmetric):
            tile = _tile(pairwise, sides, start, length, symmetric)
            logits, own_b = _upper(pairwise.forward(tile), b, symmetric)
            own_row_lse, own_grad = (t.narrow(-2, start, length) for t in (row_lse, grad_row_lse))
            grad_logits, grad_b = log_product_gradients(
                logits, own_b, own_row_lse, own_grad, of_sides, needs[5], scratch
            )
            if sums[5] is not None:
                _last(sums[5], own_b.shape[-1], -1).add_(grad_b.sum_to_size(own_b.shape))
            if of_sides:
                weights = grad_logits.sum_to_size(logits.shape).to(logits.dtype)
                found = iter(pairwise.backward(weights, tile, side_needs))
                for whole in _tile(pairwise, [*sums[:2], *sums[3:5]], start, length, symmetric):
                    if whole is not None:
                        whole += next(found)
    units = (unit, unit**2, None) * 2
    count = 3 if symmetric else 6
    scaled = zip(sums[:count], units, tensors, strict=False)
    return [(s if u is None else s / u).to(t.dtype) for s, u, t in scaled if s is not None]


class Scratch:
    """Memory that tiles of one shape after the other write to: fresh pages would take longer than what is written."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def array(self, name: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """An array on the device of ``like``, with what was written under this name before."""
        count, found = math.prod(shape), self._arrays.get(name)
        if found is None or found.numel() < count:
            found = self._arrays[name] = like.new_empty(count, dtype=dtype)
        return found[:count].view(shape)


def log_product(x: Tensor, y: Tensor, scratch: Scratch | None = None) -> Tensor:
    """log Σ_k exp(x_nk + y_ck), (*batch, n, c) float64, for x (*batch, n, k) and float64 weights y (*batch, c, k).

    A weight of −inf counts nothing, whatever x. Sums that underflow, though their terms may not, are taken anew.
    """
    scratch = scratch or Scratch()
    (e, x_max, smallest), (w, y_max, _) = _exponentials(x, scratch), _exponentials(y, Scratch())
    total = _product(w, e).mT
    y_max = y_max.mT
    if _limits(total)[0] >= smallest:
        return total.log_().add_(x_max).add_(y_max)
    if _is_narrow(x):
        return log_product(x.double(), y, scratch)
    empty = (y_max == -math.inf) | (x_max == -math.inf) & ~y_max.isnan()
    inexact = ~(total >= smallest) & ~empty
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
    (e, x_max, smallest), (w, y_max, _) = _exponentials(x, scratch), _exponentials(y, Scratch())
    factor = (x_max + y_max.mT - value).exp_()
    scaled, inexact = grad * factor, None
    if not _limits(factor)[1] * smallest <= 1.0:
        if _is_narrow(x):
            return log_product_gradients(x.double(), y, value, grad, of_x, of_y, scratch)
        grad = torch.where(value.isinf(), 0.0, grad)
        inexact = ~(factor * smallest <= 1.0) & (grad != 0.0)
        scaled = torch.where(inexact | (grad == 0.0), 0.0, scaled)
    grad_x, grad_y = x, y  # not wanted
    if of_x:
        grad_x = scratch.array("grad", x, (*scaled.shape[:-1], x.shape[-1]))
        torch.matmul(scaled, w, out=grad_x).mul_(e)
    if of_y:
        grad_y = _product(scaled.mT, e.mT).mul_(w)
    if inexact is None:
        return grad_x, grad_y
    for c in _channels_with(inexact):
        weight, (own, upstream, taken) = y[..., c : c + 1, :], (t[..., c : c + 1] for t in (value, grad, inexact))
        shares = torch.where(taken & (weight != -math.inf), upstream * (x + weight - own).exp(), 0.0)
        if of_x:
            grad_x += shares
        if of_y:
            grad_y[..., c, :] += shares.sum(-2)
    return grad_x, grad_y


def _exponentials(x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor, float]:
    """exp(x − largest) of each row, zero where the largest is not finite; the largest; both float64; and what a sum of
    them must reach for terms that underflowed to be below its last digit.

    On CPUs those of float32 are float32 exponentials, several times faster, which keep 87 nats below the largest.
    """
    largest = x.amax(-1, keepdim=True)
    result = scratch.array("exponentials", x, x.shape)
    if _is_narrow(x):
        result.copy_(torch.sub(x, largest, out=scratch.array("narrow", x, x.shape, x.dtype)).exp_())
    else:
        result.copy_(x).sub_(largest).exp_()
    low, high = _limits(largest)
    if not -math.inf < low <= high < math.inf:
        result.masked_fill_(~largest.isfinite(), 0.0)
    info = torch.finfo(x.dtype if _is_narrow(x) else result.dtype)
    return result, largest.double(), x.shape[-1] * info.tiny / info.eps


def _is_narrow(x: Tensor) -> bool:
    """Whether exponentials are float32 at first."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product a bᵀ, ``BLOCK`` terms of a sum at a time."""
    result = a[..., :BLOCK] @ b[..., :BLOCK].mT
    for start in range(BLOCK, a.shape[-1], BLOCK):
        some, others = (t[..., start : start + BLOCK] for t in (a, b))
        if result.ndim == 2:
            result.addmm_(some, others.mT)
        else:
            result += some @ others.mT
    return result


def _channels_with(mask: Tensor) -> Iterator[int]:
    """The channels c for which any of ``mask`` (*batch, n, c) may hold."""
    return (c for c in range(mask.shape[-1] if _may_hold(mask) else 0) if _may_hold(mask[..., c]))


def _may_hold(mask: Tensor) -> bool:
    """Whether any of ``mask`` holds; True while a CUDA graph is captured, where nobody may ask."""
    return _is_captured(mask) or bool(mask.any())


def _limits(t: Tensor) -> tuple[float, float]:
    """The smallest and the largest number of ``t``; NaN, which no comparison holds of, where any is, where there are
    none, and while a CUDA graph is captured."""
    if t.numel() == 0 or _is_captured(t):
        return math.nan, math.nan
    low, high = torch.stack(t.aminmax()).tolist() if t.is_cuda else (m.item() for m in t.aminmax())
    return low, high


def _is_captured(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def _prepared(pairwise: Pairwise, tensors: Tensors) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Both sides in units of length ``unit``, their weights in float64 and NaN for +inf, and ``unit``.

    Components without weight in any channel are N(0, I).
    """
    prepared: list[Tensor] = []
    weights: list[Tensor] = []
    for k in range(0, len(tensors), 3):
        means, spread, channels = tensors[k : k + 3]
        low, high = _limits(channels)
        if not -math.inf < low <= high < math.inf:
            present = (channels != -math.inf).any(-2)
            own = 1.0 if pairwise.axis == -2 else torch.eye(means.shape[-1], dtype=means.dtype, device=means.device)
            means = torch.where(reference.somewhere(present, means.shape[:-1]).unsqueeze(-1), means, 0.0)
            if spread.shape[pairwise.axis] == means.shape[-2]:
                kept = reference.somewhere(present, spread.shape[: pairwise.axis + 1])
                spread = torch.where(kept.view(*kept.shape, *(1,) * (-1 - pairwise.axis)), spread, own)
            channels = torch.where(channels == math.inf, math.nan, channels)
        prepared += (means, spread)
        weights.append(channels.double())
    unit = torch.ones((), dtype=torch.float64, device=tensors[0].device)
    if pairwise.axis == -2:
        prepared, unit = _in_units(prepared)
    if len(weights) == 1:
        prepared, weights = prepared * 2, weights * 2
    return prepared, weights[0], weights[1], unit


def _in_units(sides: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Means divided by a power of two near √(4πs), s the middle of the variances, variances by its square; and it.

    Logits of pairs, then, have no large term in common, and float32 rounds what differs. It is 1 where numbers would
    leave the range.
    """
    logs = [t.abs().log2() for t in sides[1::2]]
    middle = torch.stack([t.mean(dtype=torch.float64) for t in logs]).mean()
    if not math.isfinite(_limits(middle)[0]):
        middles = [torch.where(t.isfinite(), t, math.nan).nanmean(dtype=torch.float64) for t in logs]
        middle = torch.stack(middles).nanmean().nan_to_num(0.0)
    unit = torch.exp2((0.5 * (middle + math.log2(4.0 * math.pi))).round_())
    scaled = [t / power for t, power in zip(sides, (unit, unit**2) * 2, strict=False)]
    limits = [_limits(t) for t in scaled]
    if all(abs(low) < 2.0**100 and high < 2.0**100 for low, high in limits) and all(
        low > 2.0**-100 for low, _ in limits[1::2]
    ):
        return scaled, unit
    outside = [((t.abs() > 2.0**100) & whole.isfinite()).any() for t, whole in zip(scaled, sides, strict=True)]
    outside += [
        ((t.abs() < 2.0**-100) & (whole != 0.0)).any() for t, whole in zip(scaled[1::2], sides[1::2], strict=True)
    ]
    fits = ~torch.stack(outside).any()
    return [torch.where(fits, *pair) for pair in zip(scaled, sides, strict=True)], torch.where(fits, unit, 1.0)


def _tiles(pairwise: Pairwise, sides: list[Tensor], b: Tensor, symmetric: bool) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each tile: a choice of sizes alone."""
    n, m = sides[0].shape[-2], sides[2].shape[-2]
    batches = [*(t.shape[:-2] for t in (*sides[::2], b)), *(t.shape[: pairwise.axis] for t in sides[1::2])]
    batch = broadcast(*batches)
    per_row = max(1, math.prod(batch) * m)
    most = reference.CHUNK_ELEMENTS // pairwise.elements
    tile = min(TILE, most) if b.device.type == "cpu" else most
    length = max(1, tile // per_row, min(TILE_ROWS, most // per_row))
    if symmetric:
        length = min(length, max(-(-n // TRIANGLE_TILES), 4 * TILE_ROWS))
    return ((start, min(length, n - start)) for start in range(0, n, length))


def _tile(
    pairwise: Pairwise, sides: Sequence[Tensor | None], start: int, length: int, symmetric: bool
) -> list[Tensor | None]:
    """The tensors of both sides: of p a tile's rows, of q all columns, or those from the first row on."""
    axes, columns = (-2, pairwise.axis), list(sides[2:])
    if symmetric:
        columns = [reference._slice(t, start, sys.maxsize, axis) for t, axis in zip(columns, axes, strict=True)]
    return [*(reference._slice(t, start, length, axis) for t, axis in zip(sides[:2], axes, strict=True)), *columns]


def _upper(logits: Tensor, b: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Logits of a tile and the weights of its columns; of its square those above the diagonal, half of that on it."""
    if not symmetric:
        return logits, b
    length, columns = logits.shape[-2:]
    square = logits.narrow(-1, 0, length)
    below = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril_(-1)
    square.masked_fill_(below, -math.inf).diagonal(dim1=-2, dim2=-1).sub_(math.log(2.0))
    return logits, _last(b, columns, -1)


def _last(t: Tensor, count: int, axis: int) -> Tensor:
    """The last ``count`` of ``t``."""
    return t.narrow(axis, t.shape[axis] - count, count)
