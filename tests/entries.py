"""The backends under test, and the differentiable entries as functions of tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, pairs, testing

Entry = Callable[..., Tensor]

BACKENDS = tuple(name for name in csdiv.available_backends() if name not in ("cuda", "triton", "interpreter", "ptx"))
"""Those that compute on CPU tensors; where there is a GPU its backend is one of them, see gpu.py. The interpreter
is slow, and has tests of its own in test_triton_contract.py and the like."""

WITH_FULL = tuple(name for name in BACKENDS if backends.has_full(name))
"""Those of them that have full covariances."""


def sides(*t: Tensor) -> tuple[GaussianMixture, GaussianMixture]:
    return testing.mixture_of(*t[:3]), testing.mixture_of(*t[3:])


def _regularizer(m: Tensor, v: Tensor, *q: Tensor, backend: str = "auto") -> Tensor:
    return csdiv.cs_regularizer(m, v, testing.mixture_of(*q), backend=backend)


def _channels(*t: Tensor, backend: str = "auto") -> Tensor:
    """Two channels of p, one of q."""
    p, q = sides(t[0], t[1], None, t[3], t[4], None)
    return csdiv.channel_log_overlap(p, q, torch.stack([t[2], 2.0 * t[2]], -2), t[5].unsqueeze(-2), backend=backend)


def _channels_at_once(*t: Tensor, backend: str = "auto") -> Tensor:
    """Three channels of p, two of q, in the one pass that :func:`csdiv.channel_log_overlap` takes for larger ones."""
    a, b = torch.stack([t[2], 2.0 * t[2], -t[2]], -2), torch.stack([t[5], 0.5 * t[5]], -2)
    sides = [GaussianMixture._unchecked(means=m, variances=v, log_weights=w) for m, v, w in ((*t[:2], a), (*t[3:5], b))]
    p, q = pairs.one_dtype(*sides)
    return pairs.route(p, q, backend).value("channel_overlap").to(p.dtype)


def _divergences(*t: Tensor, backend: str = "auto") -> Tensor:
    """Of two channels of p from one of q, linear weights."""
    p, q = sides(t[0], t[1], None, t[3], t[4], None)
    a, b = torch.stack([-t[2], -2.0 * t[2]], -2), -t[5].unsqueeze(-2)
    return csdiv.channel_cs_divergence(p, q, p_weights=a, q_weights=b, backend=backend)


def _channels_of_one(*t: Tensor, backend: str = "auto") -> Tensor:
    """Three channels of one mixture with each other, in one pass over half of the pairs."""
    w = torch.stack([t[2], 2.0 * t[2], -t[2]], -2)
    p = pairs.widen(GaussianMixture._unchecked(means=t[0], variances=t[1], log_weights=w))
    way = pairs.route(p, p, backend)
    return way.value("channel_overlap" if way.eager else "channel_self_overlap").to(p.dtype)


ENTRIES: dict[str, tuple[int, Entry]] = {
    "cs_divergence": (6, lambda *t, backend="auto": csdiv.cs_divergence(*sides(*t), backend=backend)),
    "log_overlap": (6, lambda *t, backend="auto": csdiv.log_overlap(*sides(*t), backend=backend)),
    "self_overlap": (3, lambda *t, backend="auto": csdiv.log_overlap(testing.mixture_of(*t), backend=backend)),
    "component_log_overlap": (
        5,
        lambda *t, backend="auto": csdiv.component_log_overlap(*sides(t[0], t[1], None, *t[2:]), backend=backend),
    ),
    "pairwise_log_overlap": (
        4,
        lambda *t, backend="auto": csdiv.pairwise_log_overlap(*sides(t[0], t[1], None, *t[2:]), backend=backend),
    ),
    "cs_regularizer": (5, _regularizer),
    "ise": (6, lambda *t, backend="auto": csdiv.ise(*sides(*t), backend=backend)),
    "log ise": (6, lambda *t, backend="auto": csdiv.ise(*sides(*t), log=True, backend=backend)),
    "nise": (6, lambda *t, backend="auto": csdiv.nise(*sides(*t), backend=backend)),
    "mmd2": (6, lambda *t, backend="auto": csdiv.mmd2(*sides(*t), 0.7, backend=backend)),
    "cosine_similarity": (6, lambda *t, backend="auto": csdiv.cosine_similarity(*sides(*t), backend=backend)),
    "channel_log_overlap": (6, _channels),
    "channels at once": (6, _channels_at_once),
    "channel_cs_divergence": (6, _divergences),
    "channels of one mixture": (3, _channels_of_one),
}
"""Each entry as a function of the tensors that it depends on, and how many these are."""


def tensors(entry: str, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> tuple[Tensor, ...]:
    def side(k: int, d: int) -> list[Tensor]:
        return [torch.randn(k, d), torch.rand(k, d) + 0.5, torch.randn(k).log_softmax(-1)]

    (pm, pv, pw), (qm, qv, qw) = side(3, 2), side(4, 2)
    inputs = {3: (pm, pv, pw), 4: (pm, pv, qm, qv), 5: (pm, pv, qm, qv, qw), 6: (pm, pv, pw, qm, qv, qw)}
    return tuple(t.to(dtype).requires_grad_(requires_grad) for t in inputs[ENTRIES[entry][0]])


def function(entry: str, backend: str = "auto") -> Entry:
    return lambda *t: ENTRIES[entry][1](*t, backend=backend)


def summed(entry: str, backend: str = "auto") -> Entry:
    """A scalar with a different upstream gradient for each element."""

    def total(*t: Tensor) -> Tensor:
        value = function(entry, backend)(*t)
        return (value * torch.arange(value.numel(), dtype=value.dtype).cos().view(value.shape)).sum()

    return total


def every(entry: str) -> tuple[int, ...]:
    return tuple(range(ENTRIES[entry][0]))
