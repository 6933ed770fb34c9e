"""The operators: one schema, one fake and one implementation each, so that torch sees opaque calls.

Tensors are described in :mod:`csdiv.backends.reference`, whose functions these call on the backend chosen from
``backend`` and the device, on real tensors. Operators know no gradients: :mod:`csdiv.autograd` pairs them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from csdiv import backends

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
    module = backends.resolve(backend, p_means.device)
    return module.overlap_lse_forward(p_means, p_variances, q_means, q_variances, q_log_weights, needs)


@_define(
    "overlap_lse_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def overlap_lse_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve(backend, grad.device).overlap_lse_backward(grad, tensors, saved, needs)


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
    module = backends.resolve(backend, p_means.device)
    return module.log_overlap_forward(p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights, needs)


@_define(
    "log_overlap_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def log_overlap_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve(backend, grad.device).log_overlap_backward(grad, tensors, saved, needs)


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
    return backends.resolve(backend, means.device).self_overlap_forward(means, variances, log_weights, needs)


@_define(
    "self_overlap_backward(Tensor grad, Tensor?[] tensors, Tensor value, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, value, needs, backend: _fake_gradients(tensors, needs),
)
def self_overlap_backward(
    grad: Tensor, tensors: list[Tensor | None], value: Tensor, needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve(backend, grad.device).self_overlap_backward(grad, tensors, value, needs)


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
    module = backends.resolve(backend, p_means.device)
    return module.cs_divergence_forward(p_means, p_variances, p_log_weights, q_means, q_variances, q_log_weights, needs)


@_define(
    "cs_divergence_backward(Tensor grad, Tensor?[] tensors, Tensor[] saved, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, saved, needs, backend: _fake_gradients(tensors, needs),
)
def cs_divergence_backward(
    grad: Tensor, tensors: list[Tensor | None], saved: list[Tensor], needs: list[bool], backend: str
) -> list[Tensor]:
    return backends.resolve(backend, grad.device).cs_divergence_backward(grad, tensors, saved, needs)


def _fake_pairwise_forward(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, backend: str
) -> Tensor:
    batch = _batch(p_means, p_variances, q_means, q_variances)
    return p_means.new_empty(*batch, p_means.shape[-2], q_means.shape[-2])


@_define(f"pairwise_forward({_P}, {_Q}, str backend) -> Tensor", _fake_pairwise_forward)
def pairwise_forward(
    p_means: Tensor, p_variances: Tensor, q_means: Tensor, q_variances: Tensor, backend: str
) -> Tensor:
    return backends.resolve(backend, p_means.device).pairwise_forward(p_means, p_variances, q_means, q_variances)


@_define(
    "pairwise_backward(Tensor grad, Tensor?[] tensors, bool[] needs, str backend) -> Tensor[]",
    lambda grad, tensors, needs, backend: _fake_gradients(tensors, needs),
)
def pairwise_backward(grad: Tensor, tensors: list[Tensor | None], needs: list[bool], backend: str) -> list[Tensor]:
    return backends.resolve(backend, grad.device).pairwise_backward(grad, tensors, needs)


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
    module = backends.resolve(backend, p_means.device)
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
