"""Channels: several weightings of the same components, compared with each other; conventions are those of
:mod:`csdiv.functional`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from csdiv import pairs, reference, weights
from csdiv.checks import as_float_tensor, exactly_one
from csdiv.mixture import EVENT_DIMS, MATRICES, GaussianMixture, log_of_weights
from csdiv.pairs import MixtureLike
from csdiv.shapes import broadcast
from csdiv.transforms import forward_level, has_values

COSTS = (8, 20, 2**20, 2**20)
"""What the ways over the pairs of components cost, measured on CPUs, in dimensions of a pair: each takes 8 + D for a
pair, or 8 + D² with full covariances; one pass for all channels 20 more, and 2²⁰ for the call; a call for each pair of
channels 2²⁰ for the call."""


SMALL = (2**9, 2**18)
"""The largest number of components of a side, and of pairs, for which plain torch on all pairs, in float64, is faster
than any of them."""


def channel_log_overlap(
    p: MixtureLike,
    q: MixtureLike | None = None,
    p_log_weights: Tensor | None = None,
    q_log_weights: Tensor | None = None,
    *,
    p_weights: Tensor | None = None,
    q_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """log V of every pair of channels: weightings c of p's components with weightings c′ of q's, equation (16).

    Soft assignments, class posteriors and bags of samples are such weightings. ``log_overlap`` of a batch of mixtures
    that share their components would go over all pairs of components C C′ times. This takes what is estimated to be the
    fastest of three ways: once over them, with the sums of all channels from matrix products in float64; min(C, C′)
    times; or a call for each pair of channels with the components that have weight there, as hard labels make cheap
    (on CPUs, without batch dimensions). Sizes decide, and how many weights are zero; "reference" goes min(C, C′) times.

    Args:
        p, q: mixtures with N and M components; their own weights are not used. Without q, or with p itself as q, the
            components are p's, and without weights for q its channels are p's as well: that takes half the work.
        p_log_weights: (*batch, C, N), as given; −inf is a weight of zero.
        q_log_weights: (*batch, C′, M).
        p_weights, q_weights: weights ≥ 0 in place of their logarithms, as given: zeros are allowed, and the gradient to
            them is the derivative there (second derivatives take them as absent). One kind for each side.
        backend: see the module.

    Returns:
        (*batch, C, C′) nats. Differences of them lose what rounding to the dtype takes from a large common term: see
        :func:`channel_cs_divergence`.

    Gradients: to means and covariances of both sides, and to the weights, in one more pass. Memory
    O((N + M) (D + C + C′)) and a few times ``csdiv.reference.CHUNK_ELEMENTS`` numbers.

    Raises: as :func:`cs_divergence`.
    """
    p, q = _pair(p, q, (p_log_weights, q_log_weights), (p_weights, q_weights))
    return _overlaps(p, q, backend).to(p.dtype)


def channel_cs_divergence(
    p: MixtureLike,
    q: MixtureLike | None = None,
    p_log_weights: Tensor | None = None,
    q_log_weights: Tensor | None = None,
    *,
    p_weights: Tensor | None = None,
    q_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cauchy–Schwarz divergence of every pair of channels, −log V_cc′ + ½ log V_cc(p, p) + ½ log V_c′c′(q, q).

    The three terms are put together in float64 and rounded to the dtype at the end, so that the scale that they have in
    common costs nothing: for channels that are nearly proportional |error| ≤ 2e-6 · max(1, D / 64) in float32 on the
    CPU, as of :func:`cs_divergence`; on the diagonal of one set of channels it is 0 exactly.

    Where p and q are one mixture, one pass over half of the pairs of components gives all three terms.

    Args, gradients, memory and Raises: as :func:`channel_log_overlap`.

    Returns:
        (*batch, C, C′) nats; +inf where nothing overlaps in the dtype, NaN for a channel without weight.

    Example:
        >>> points = GaussianMixture(torch.randn(200, 8), torch.full((1, 1), 0.5))
        >>> csdiv.channel_cs_divergence(points, p_weights=torch.rand(3, 200)).shape
        torch.Size([3, 3])
    """
    p, q = _pair(p, q, (p_log_weights, q_log_weights), (p_weights, q_weights))
    dtype, channels = p.dtype, _num_channels(p)
    if pairs.route(p, q, backend).eager:
        wide = p.map(torch.Tensor.double)
        p, q = wide, wide if q is p else q.map(torch.Tensor.double)
    if (joined := _joined(p, q)) is not None:
        overlaps = _overlaps(joined, joined, backend)
        own = overlaps.diagonal(dim1=-2, dim2=-1)
        of_p, of_q, overlaps = own[..., :channels], own[..., channels:], overlaps[..., :channels, channels:]
    else:
        overlaps = _overlaps(p, q, backend)
        of_p = overlaps.diagonal(dim1=-2, dim2=-1) if q is p else _self_overlaps(p, backend)
        of_q = of_p if q is p else _self_overlaps(q, backend)
    return (0.5 * (of_p.unsqueeze(-1) + of_q.unsqueeze(-2)) - overlaps).to(dtype)


# Both sides with their channels

_Given = tuple[Tensor | None, Tensor | None]


def _pair(
    p: MixtureLike, q: MixtureLike | None, log_weights: _Given, linear: _Given
) -> tuple[GaussianMixture, GaussianMixture]:
    """Both sides of one dtype, with their channels in place of their weights; one and the same if all of it is."""
    one_mixture = q is None or q is p
    p = pairs.as_mixture(p, "p")
    p, q = pairs.as_pair(p, p if one_mixture else q)
    (p_log, q_log), (p_linear, q_linear) = log_weights, linear
    if one_mixture and ((q_log is None and q_linear is None) or (q_log is p_log and q_linear is p_linear)):
        p = pairs.widen(_with_channels(p, p_log, p_linear, "p"))
        return p, p
    p, q = _with_channels(p, p_log, p_linear, "p"), _with_channels(p if one_mixture else q, q_log, q_linear, "q")
    pairs.check_batches(_batch_shape(p), _batch_shape(q), "p", "q")
    return pairs.one_dtype(p, q)


def _with_channels(p: GaussianMixture, log_weights: Tensor | None, linear: Tensor | None, side: str) -> GaussianMixture:
    """p with the weights of its channels, (*batch, C, K), in place of its own."""
    name, given = exactly_one(**{f"{side}_log_weights": log_weights, f"{side}_weights": linear})
    given = as_float_tensor(given, name)
    if given.ndim < 2 or given.shape[-1] != p.num_components:
        raise ValueError(f"{name}: (*batch, C, K) with K = {p.num_components} expected, got {tuple(given.shape)}")
    if given.device != p.device:
        raise ValueError(f"one device expected, got {side} on {p.device} and weights on {given.device}")
    pairs.check_batches(p.batch_shape, given.shape[:-2], side, name)
    values = {name: t for name, t, _ in _components(p)}
    if linear is None:
        return GaussianMixture._unchecked(**values, log_weights=given)
    given = given.to(pairs.computing_dtype(given.dtype))
    return GaussianMixture._unchecked(**values, weights=given, log_weights=log_of_weights(given))


def _components(p: GaussianMixture) -> list[tuple[str, Tensor, int]]:
    """p's means and covariances by name, with the number of their dimensions beside those of the batch."""
    fields = ("means", "variances", *MATRICES)
    return [(name, t, EVENT_DIMS[name]) for name in fields if (t := getattr(p, name)) is not None]


def _batch_shape(p: GaussianMixture) -> torch.Size:
    assert p.log_weights is not None
    return broadcast(p.log_weights.shape[:-2], *(t.shape[:-event] for _, t, event in _components(p)))


def _num_channels(p: GaussianMixture) -> int:
    assert p.log_weights is not None
    return p.log_weights.shape[-2]


def _joined(p: GaussianMixture, q: GaussianMixture) -> GaussianMixture | None:
    """The channels of both in one mixture, if they have the same components and kind of weights."""
    shared = all(getattr(p, name) is getattr(q, name) for name in ("means", "variances", *MATRICES))
    if q is p or not shared or (p.weights is None) != (q.weights is None):
        return None
    both = {name: t for name, t, _ in _components(p)}
    for name in ("weights", "log_weights"):
        given = [t for t in (getattr(p, name), getattr(q, name)) if t is not None]
        if given:
            batch = broadcast(*(t.shape[:-2] for t in given))
            both[name] = torch.cat([t.expand(*batch, *t.shape[-2:]) for t in given], -2)
    return GaussianMixture._unchecked(**both)


# Ways over the pairs of components


def _overlaps(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V of p's channels with q's, (*batch, C, C'), in float64 where the backend has it."""
    value = _without_zeros(p, q, backend)
    for side, other, swapped in ((p, q, False), (q, p, True)):
        if side.weights is not None:
            fixed, log_sum = other.detach(), value.mT if swapped else value

            def overlap(absent: GaussianMixture, fixed: GaussianMixture = fixed) -> Tensor:
                return _without_zeros(absent, fixed, backend)

            missing = weights.correction(side, log_sum, overlap, channels=True)
            if missing is not None:
                value = value + (missing.mT if swapped else missing).to(value.dtype)
    return value


def _self_overlaps(p: GaussianMixture, backend: str) -> Tensor:
    """log V of each channel of p with itself, (*batch, C)."""
    route = pairs.route(p, p, backend)
    if _is_small(p, p, route) or _way(p, p, route) == ONE:
        return _overlaps(p, p, backend).diagonal(dim1=-2, dim2=-1)
    return pairs.self_overlap(_by_channel(p), backend)


def _without_zeros(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """As :func:`_overlaps`, but that linear weights of zero have no gradient."""
    if _num_channels(p) < _num_channels(q):
        return _without_zeros(q, p, backend).mT
    route = pairs.route(p, q, backend)
    if _is_small(p, q, route) and (value := _of_all_pairs(p, q, backend)) is not None:
        return value
    way = _way(p, q, route)
    if way == ONE:
        return route.value("channel_self_overlap" if q is p and not route.eager else "channel_overlap")
    if way == SPLIT:
        return _split(p, q, backend)
    assert p.log_weights is not None
    row_lse, offset = pairs.route(_by_channel(p), _by_channel(q), backend).parts("overlap_lse")
    value = reference.channel_lse(p.log_weights.double(), row_lse.double())
    return value if offset is None else value + offset.mT


def _is_small(p: GaussianMixture, q: GaussianMixture, route: pairs.Route) -> bool:
    """Whether :func:`_of_all_pairs` may be tried: few pairs, and values to be read without waiting for a GPU."""
    components, count = SMALL
    if route.eager or p.device.type != "cpu" or not has_values(p.means) or forward_level() >= 0:
        return False
    return max(p.num_components, q.num_components) <= components and _num_pairs(p, q) <= count


def _num_pairs(p: GaussianMixture, q: GaussianMixture) -> int:
    """The number of pairs of components of the whole batch."""
    return math.prod(broadcast(p.means.shape[:-2], q.means.shape[:-2])) * p.num_components * q.num_components


def _of_all_pairs(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor | None:
    """log V from the matrix of all pairs in float64, differentiated by torch; None where sums underflow or terms are
    not finite."""
    wide = p.map(torch.Tensor.double)
    other = wide if q is p else q.map(torch.Tensor.double)
    bare = [GaussianMixture._unchecked(**{name: t for name, t, _ in _components(side)}) for side in (wide, other)]
    logits = pairs.route(bare[0], bare[0 if q is p else 1], backend).value("pairwise")
    largest = logits.detach().amax((-2, -1), keepdim=True)
    sides = [wide] if q is p else [wide, other]
    log_weights = [t for side in sides if (t := side.log_weights) is not None]
    shifts = [t.detach().amax(-1, keepdim=True) for t in log_weights]
    weights = [(t - shift).exp() for t, shift in zip(log_weights, shifts, strict=True)]
    total = _Products.apply(weights[0], (logits - largest).exp(), weights[-1])
    info = torch.finfo(torch.float64)
    if not bool((total.detach() >= max(logits.shape) ** 2 * info.tiny / info.eps).all()):
        return None
    return total.log() + (largest + shifts[0] + shifts[-1].mT)


class _Products(torch.autograd.Function):
    """a e bᵀ, by products of a layout that BLAS adds up in one order for any number of threads."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, e, b)
        return _product(_product(b, e), a).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, e, b = ctx.saved_tensors
        need_a, need_e, need_b = ctx.needs_input_grad
        grad_a = _product(grad, _product(b, e).mT).sum_to_size(a.shape) if need_a else None
        grad_e = _product(a.mT, _product(grad, b.mT).mT).sum_to_size(e.shape) if need_e else None
        grad_b = _product(grad.mT, _product(a, e.mT).mT).sum_to_size(b.shape) if need_b else None
        return grad_a, grad_e, grad_b


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ."""
    return a @ b.contiguous().mT


ONE, EACH, SPLIT = "one pass for all channels", "a pass for each channel", "a call for each pair of channels"


def _way(p: GaussianMixture, q: GaussianMixture, route: pairs.Route) -> str:
    """The way that is estimated to cost least, by sizes and, where they can be read at once, by how many weights are 0.

    The reference always takes ``ONE``, which it computes as a batch of mixtures.
    """
    if route.eager:
        return ONE
    pair, added, call, calls = COSTS
    pair += p.dim if route.formula == pairs.DIAGONAL else p.dim**2
    half, channels = 0.5 if q is p else 1.0, (_num_channels(p), _num_channels(q))
    count = _num_pairs(p, q)
    way, cost = EACH, float(pair * count * channels[1])
    if (one := call + half * (pair + added) * count) <= cost:
        way, cost = ONE, one
    all_calls = calls * half * math.prod(channels)
    if all_calls < cost and _can_be_split(p) and _can_be_split(q):
        split = all_calls + half * pair * _num_weights(p) * _num_weights(q)
        way = SPLIT if split < cost else way
    return way


def _can_be_split(p: GaussianMixture) -> bool:
    """Whether p has no batch, and values to be read without waiting for a GPU."""
    assert p.log_weights is not None
    return p.device.type == "cpu" and has_values(p.log_weights) and not _batch_shape(p)


def _num_weights(p: GaussianMixture) -> int:
    """How many weights of all channels are not zero."""
    assert p.log_weights is not None
    return int(p.log_weights.ne(-math.inf).sum())


def _split(p: GaussianMixture, q: GaussianMixture, backend: str) -> Tensor:
    """log V of each pair of channels from the components that have weight there, (C, C')."""
    rows = [_channel(p, c) for c in range(_num_channels(p))]
    columns = rows if q is p else [_channel(q, c) for c in range(_num_channels(q))]
    found: dict[tuple[int, int], Tensor] = {}
    for c, row in enumerate(rows):
        for e, column in enumerate(columns):
            if q is p and e < c:
                found[c, e] = found[e, c]
            elif row is None or column is None:
                found[c, e] = p.means.new_full((), -math.inf, dtype=torch.float64)
            else:
                name = "self_overlap" if row is column else "log_overlap"
                found[c, e] = pairs.route(row, column, backend).value(name)
    return torch.stack(list(found.values())).view(len(rows), len(columns))


def _channel(p: GaussianMixture, c: int) -> GaussianMixture | None:
    """Channel c of p, without the components that have no weight there; None if all are without."""
    assert p.log_weights is not None
    log_weights = p.log_weights[c]
    (index,) = (log_weights != -math.inf).nonzero(as_tuple=True)
    if len(index) == 0:
        return None
    values = {name: t if t.shape[-event] == 1 else t.index_select(-event, index) for name, t, event in _components(p)}
    return GaussianMixture._unchecked(**values, log_weights=log_weights[index])


def _by_channel(p: GaussianMixture) -> GaussianMixture:
    """The channels of p as a batch of mixtures that share their components."""
    values = {name: t.unsqueeze(-event - 1) for name, t, event in _components(p)}
    return GaussianMixture._unchecked(**values, weights=p.weights, log_weights=p.log_weights)
