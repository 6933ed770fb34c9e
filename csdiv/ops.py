"""The operators: one schema, one fake and one implementation each, so that torch sees opaque calls.

Tensors are described in :mod:`csdiv.backends.reference`, whose functions these call on the backend chosen from
``backend`` and the device, on real tensors. Operators know no gradients: :mod:`csdiv.autograd` pairs them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from csdiv import backends
from csdiv.backends import channels

_library = torch.library.Library("csdiv", "DEF")
_Fake = Callable[..., Any]


def _define(schema: str, fake: _Fake) -> Callable[[Callable[..., Any]], Any]:
    """Registers the decorated function as the operator ``schema``, and ``fake`` for its shapes."""
    name = schema.split("(")[0]

    def register(function: Callable[..., Any]) -> Any:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _library.impl(name, function, key)
        torch.library.register_fake(f"csdiv::{name}", fake, lib=_library)
        return getattr(torch.ops.csdiv, name).default

    return register


def _batch(*means: Tensor, weights: Sequence[Tensor | None] = ()) -> torch.Size:
    shapes = [t.shape[:-2] for t in means]
    return torch.broadcast_shapes(*shapes, *(t.shape[:-1] for t in weights if t is not None))


def _fake_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


def _module(backend: str, tensors: Sequence[Tensor | None], own: int = 2) -> ModuleType:
    """The backend of a pair, or of one side; ``tensors``: means and variances of p, and those of q from ``own`` on."""
    p_means, p_variances, q_means, q_variances = (*tensors[:2], *(tensors[own : own + 2] or tensors[:2]))
    assert p_means is not None
    assert p_variances is not None
    assert q_means is not None
    assert q_variances is not None
    sizes = (p_means.shape[-2], q_means.shape[-2], p_means.shape[-1])
    shape = backends.shape_of(*sizes, p_variances.shape, q_variances.shape)
    return backends.resolve(backend, p_means.device, shape)


_P, _Q = "Tensor p_means, Tensor p_variances", "Tensor q_means, Tensor q_variances"
_P_WEIGHTS, _Q_WEIGHTS = "Tensor? p_log_weights", "Tensor? q_log_weights"
_FULL_PAIR = "Tensor p_means, Tensor p_covariances, Tensor q_means, Tensor q_covariances"


def _fake_overlap_lse_forward(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    batch = _batch(p_means, p_variances, q_means, q_variances, weights=[q_log_weights])
    tensors = [p_means, p_variances, q_means, q_variances, q_log_weights]
    rows, offset = p_means.new_empty(*batch, p_means.shape[-2]), p_means.new_empty(*batch, 1, dtype=torch.float64)
    return rows, offset, _fake_gradients(tensors, needs)


@_define(
    f"overlap_lse_forward({_P}, {_Q}, {_Q_WEIGHTS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor[])",
    _fake_overlap_lse_forward,
)
def overlap_lse_forward(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    module = _module(backend, (p_means, p_variances, q_means, q_variances))
    return module.overlap_lse_forward(p_means, p_variances, q_means, q_variances, q_log_weights, needs)


@_define(
    "overlap_lse_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def overlap_lse_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return _module(backend, tensors).overlap_lse_backward(grad, tensors, saved, needs)


def _fake_log_overlap_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch = _batch(p_means, p_variances, q_means, q_variances, weights=[p_log_weights, q_log_weights])
    value = p_means.new_empty(batch, dtype=torch.float64)
    tensors = [p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights]
    rows = p_means.new_empty(*batch, p_means.shape[-2])
    return value, torch.empty_like(value), rows, _fake_gradients(tensors, needs)


@_define(
    f"log_overlap_forward({_P}, {_P_WEIGHTS}, {_Q}, {_Q_WEIGHTS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    _fake_log_overlap_forward,
)
def log_overlap_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    module = _module(backend, (p_means, p_variances, q_means, q_variances))
    return module.log_overlap_forward(p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights, needs)


@_define(
    "log_overlap_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def log_overlap_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return _module(backend, tensors, 3).log_overlap_backward(grad, tensors, saved, needs)


def _fake_self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    value = means.new_empty(_batch(means, variances, weights=[log_weights]), dtype=torch.float64)
    return value, torch.empty_like(value), _fake_gradients([means, variances, log_weights], needs)


@_define(
    "self_overlap_forward(Tensor means, Tensor variances, Tensor? log_weights, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor[])",
    _fake_self_overlap_forward,
)
def self_overlap_forward(
    means: Tensor, variances: Tensor, log_weights: Tensor | None, needs: list[bool], backend: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return _module(backend, (means, variances)).self_overlap_forward(means, variances, log_weights, needs)


@_define(
    "self_overlap_backward(Tensor grad, Tensor?[] tensors, Tensor value, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, value, needs, backend: _fake_gradients(tensors, needs),
)
def self_overlap_backward(
    grad: Tensor, tensors: list[Tensor | None], value: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    return _module(backend, tensors[:2]).self_overlap_backward(grad, tensors, value, needs)


def _fake_cs_divergence_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    batch = _batch(p_means, p_variances, q_means, q_variances, weights=[p_log_weights, q_log_weights])
    tensors = [p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights]
    rows, overlaps = p_means.new_empty(*batch, p_means.shape[-2]), p_means.new_empty(*batch, 3, dtype=torch.float64)
    return p_means.new_empty(batch), rows, overlaps, _fake_gradients(tensors, needs)


@_define(
    f"cs_divergence_forward({_P}, {_P_WEIGHTS}, {_Q}, {_Q_WEIGHTS}, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    _fake_cs_divergence_forward,
)
def cs_divergence_forward(
    p_means: Tensor,
    p_variances: Tensor,
    p_log_weights: Tensor | None,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    module = _module(backend, (p_means, p_variances, q_means, q_variances))
    return module.cs_divergence_forward(p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights, needs)


@_define(
    "cs_divergence_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def cs_divergence_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return _module(backend, tensors, 3).cs_divergence_backward(grad, tensors, saved, needs)


def _fake_pairwise_forward(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, backend: str
) -> Tensor:
    batch = _batch(p_means, p_variances, q_means, q_variances)
    return p_means.new_empty(*batch, p_means.shape[-2], q_means.shape[-2])


@_define(f"pairwise_forward({_P}, {_Q}, str backend) -> Tensor", _fake_pairwise_forward)
def pairwise_forward(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, backend: str
) -> Tensor:
    module = _module(backend, (p_means, p_variances, q_means, q_variances))
    return module.pairwise_forward(p_means, p_variances, q_means, q_variances)


@_define(
    "pairwise_backward(Tensor grad, Tensor?[] tensors, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, needs, backend: _fake_gradients(tensors, needs),
)
def pairwise_backward(grad: Tensor, tensors: list[Tensor | None], needs: list[bool], backend: str) -> list[Tensor]:
    return _module(backend, tensors).pairwise_backward(grad, tensors, needs)


def _fake_channel_overlap_forward(
    p_means: Tensor,
    p_spread: Tensor,
    q_means: Tensor,
    q_spread: Tensor,
    p_log_weights: Tensor,
    q_log_weights: Tensor,
    full: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    spreads = [t[..., 0] if full else t for t in (p_spread, q_spread)]
    rows_batch = _batch(p_means, q_means, *spreads, q_log_weights)
    batch = torch.broadcast_shapes(rows_batch, p_log_weights.shape[:-2])
    count = q_log_weights.shape[-2]
    value = p_means.new_empty(*batch, p_log_weights.shape[-2], count, dtype=torch.float64)
    return value, torch.empty_like(value), value.new_empty(*rows_batch, p_means.shape[-2], count)


def _pairwise(backend: str, tensors: Sequence[Tensor], full: bool) -> channels.Pairwise:
    """What the backend of a pair has for the logits of all its pairs."""
    device, dim = tensors[0].device, tensors[0].shape[-1]
    module = backends.resolve_full(backend, device) if full else _module(backend, tensors[:4])
    elements = 1 if module is not backends.resolve("reference", device) else dim * dim if full else dim
    if full:
        return channels.Pairwise(module.full_pairwise_forward, module.full_pairwise_backward, -3, elements)
    return channels.Pairwise(module.pairwise_forward, module.pairwise_backward, -2, elements)


@_define(
    "channel_overlap_forward(Tensor p_means, Tensor p_spread, Tensor q_means, Tensor q_spread, Tensor p_log_weights,"
    " Tensor q_log_weights, bool full, str backend) -> (Tensor, Tensor, Tensor)",
    _fake_channel_overlap_forward,
)
def channel_overlap_forward(
    p_means: Tensor,
    p_spread: Tensor,
    q_means: Tensor,
    q_spread: Tensor,
    p_log_weights: Tensor,
    q_log_weights: Tensor,
    full: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = [p_means, p_spread, q_means, q_spread, p_log_weights, q_log_weights]
    return channels.forward(_pairwise(backend, tensors, full), tensors)


@_define(
    "channel_overlap_backward(Tensor grad, Tensor[] tensors, Tensor[] saved, bool[] needs, bool full, str backend)"
    " -> Tensor[]",
    lambda grad, tensors, saved, needs, full, backend: _fake_gradients(tensors, needs),
)
def channel_overlap_backward(
    grad: Tensor, tensors: list[Tensor], saved: list[Tensor], needs: list[bool], full: bool, backend: str
) -> list[Tensor]:
    return channels.backward(_pairwise(backend, tensors, full), grad, tensors, saved, needs)


def _fake_assign(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    backend: str,
) -> Tensor:
    batch = _batch(p_means, p_variances, q_means, q_variances, weights=[q_log_weights])
    return p_means.new_empty(*batch, p_means.shape[-2], dtype=torch.int64)


@_define(f"assign({_P}, {_Q}, {_Q_WEIGHTS}, str backend) -> Tensor", _fake_assign)
def assign(
    p_means: Tensor,
    p_variances: Tensor,
    q_means: Tensor,
    q_variances: Tensor,
    q_log_weights: Tensor | None,
    backend: str,
) -> Tensor:
    module = _module(backend, (p_means, p_variances, q_means, q_variances))
    return module.assign(p_means, p_variances, q_means, q_variances, q_log_weights)


def _fake_full_rows(
    p_means: Tensor,
    p_covariances: Tensor,
    q_means: Tensor,
    q_covariances: Tensor,
    q_log_weights: Tensor,
    backend: str,
) -> Tensor:
    batch = _batch(p_means, p_covariances[..., 0], q_means, q_covariances[..., 0], weights=[q_log_weights])
    return p_means.new_empty(*batch, p_means.shape[-2])


@_define(f"full_overlap_lse_forward({_FULL_PAIR}, Tensor q_log_weights, str backend) -> Tensor", _fake_full_rows)
def full_overlap_lse_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor, backend: str
) -> Tensor:
    module = backends.resolve_full(backend, p_means.device)
    return module.full_overlap_lse_forward(p_means, p_covariances, q_means, q_covariances, q_log_weights)


@_define(
    "full_overlap_lse_backward(Tensor grad, Tensor[] tensors, Tensor rows, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, rows, needs, backend: _fake_gradients(tensors, needs),
)
def full_overlap_lse_backward(
    grad: Tensor, tensors: list[Tensor], rows: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve_full(backend, grad.device).full_overlap_lse_backward(grad, tensors, rows, needs)


def _fake_full_self_overlap_forward(
    means: Tensor, covariances: Tensor, log_weights: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    batch = _batch(means, covariances[..., 0], weights=[log_weights])
    return means.new_empty(batch), means.new_empty(*batch, means.shape[-2])


@_define(
    "full_self_overlap_forward(Tensor means, Tensor covariances, Tensor log_weights, str backend) -> (Tensor, Tensor)",
    _fake_full_self_overlap_forward,
)
def full_self_overlap_forward(
    means: Tensor, covariances: Tensor, log_weights: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return backends.resolve_full(backend, means.device).full_self_overlap_forward(means, covariances, log_weights)


@_define(
    "full_self_overlap_backward(Tensor grad, Tensor[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def full_self_overlap_backward(
    grad: Tensor, tensors: list[Tensor], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve_full(backend, grad.device).full_self_overlap_backward(grad, tensors, saved, needs)


def _fake_full_pairwise_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, backend: str
) -> Tensor:
    batch = _batch(p_means, p_covariances[..., 0], q_means, q_covariances[..., 0])
    return p_means.new_empty(*batch, p_means.shape[-2], q_means.shape[-2])


@_define(f"full_pairwise_forward({_FULL_PAIR}, str backend) -> Tensor", _fake_full_pairwise_forward)
def full_pairwise_forward(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, backend: str
) -> Tensor:
    module = backends.resolve_full(backend, p_means.device)
    return module.full_pairwise_forward(p_means, p_covariances, q_means, q_covariances)


@_define(
    "full_pairwise_backward(Tensor grad, Tensor[] tensors, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, needs, backend: _fake_gradients(tensors, needs),
)
def full_pairwise_backward(grad: Tensor, tensors: list[Tensor], needs: list[bool], backend: str) -> list[Tensor]:
    return backends.resolve_full(backend, grad.device).full_pairwise_backward(grad, tensors, needs)


@_define(
    f"full_assign({_FULL_PAIR}, Tensor q_log_weights, str backend) -> Tensor",
    lambda *arguments: _fake_full_rows(*arguments).to(torch.int64),
)
def full_assign(
    p_means: Tensor, p_covariances: Tensor, q_means: Tensor, q_covariances: Tensor, q_log_weights: Tensor, backend: str
) -> Tensor:
    module = backends.resolve_full(backend, p_means.device)
    return module.full_assign(p_means, p_covariances, q_means, q_covariances, q_log_weights)
