"""The table of operators: what each takes, gives, saves and differentiates.

Schemas, fakes, autograd functions, vmap rules and the calls of every backend follow from it. One order holds everywhere,
in csrc/bindings.cpp as well: the gradient of the value, the outputs, the tensors of p, the tensors of q, each side's
weights last. :class:`csdiv.backends.Backend` describes the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_EVENT_DIMS = {"means": 2, "variances": 2, "covariances": 3, "log_weights": 1}
"""Dimensions of a tensor of each kind beside those of the batch; the log weights of channels have one more."""


class Output(NamedTuple):
    """A tensor (*batch, *sizes)."""

    name: str
    sizes: str = ""  # of N and M components, C and E channels of p and q, or a digit
    dtype: torch.dtype | None = None  # None: that of the tensors
    without: str | None = None  # a tensor whose batch dimensions this output does not have


class Operator(NamedTuple):
    """One operator. ``value``, its first output, is what is differentiated; "assign" and "full_assign" have no gradients.

    A logarithm comes in two parts where there is an output "offset": their sum is the logarithm.
    """

    name: str
    p: tuple[str, ...]  # p's tensors, as csdiv.reference.Components names them
    q: tuple[str, ...]  # q's; none: p with itself
    outputs: tuple[Output, ...]
    saved: tuple[int, ...]  # which outputs the backward pass takes
    at_once: str  # what the forward pass gives gradients of, if any are needed: "scalars", the sum of "rows", or "nothing"
    names: tuple[str, ...]  # of all tensors
    event_dims: tuple[int, ...]  # of all tensors
    full: bool  # whether it takes full covariances, all in float64
    channels: bool  # whether each side has several weightings, log weights (*batch, C, K), of its components


def _operator(name: str, p: str, q: str, outputs: list[Output], saved: str = "", at_once: str = "nothing") -> Operator:
    sides = tuple(p.split()), tuple(q.split())
    position = {output.name: k for k, output in enumerate(outputs)}
    names = tuple(f"{side}_{kind}" for side, kinds in zip("pq", sides, strict=True) for kind in kinds)
    channels = "channel" in name
    event_dims = tuple(_EVENT_DIMS[k] + (channels and k == "log_weights") for kinds in sides for k in kinds)
    back = tuple(position[k] for k in saved.split())
    return Operator(name, *sides, tuple(outputs), back, at_once, names, event_dims, "covariances" in sides[0], channels)


_COMPONENTS, _MATRICES = "means variances", "means covariances"
_MIXTURE, _FULL_MIXTURE = f"{_COMPONENTS} log_weights", f"{_MATRICES} log_weights"
_LOG, _OFFSET = Output("value", dtype=torch.float64), Output("offset", dtype=torch.float64)
_ROW_LSE, _DENSITIES, _INDEX = Output("row_lse", "N"), Output("value", "NM"), Output("value", "N", torch.int64)
_OVERLAPS = Output("overlaps", "3", torch.float64)  # log V of (p, q), (p, p) and (q, q)
_OF_CHANNELS = [
    Output("value", "CE", torch.float64),
    Output("offset", "CE", torch.float64),
    Output("row_lse", "NE", torch.float64, without="p_log_weights"),
]

OPERATORS = {
    operator.name: operator
    for operator in (
        _operator("overlap_lse", _COMPONENTS, _MIXTURE, [_ROW_LSE, Output("offset", "1", torch.float64)], "row_lse offset", "rows"),
        _operator("log_overlap", _MIXTURE, _MIXTURE, [_LOG, _OFFSET, _ROW_LSE], "value row_lse", "scalars"),
        _operator("self_overlap", _MIXTURE, "", [_LOG, _OFFSET], "value", "scalars"),
        _operator("cs_divergence", _MIXTURE, _MIXTURE, [Output("value"), _ROW_LSE, _OVERLAPS], "row_lse overlaps", "scalars"),
        _operator("pairwise", _COMPONENTS, _COMPONENTS, [_DENSITIES]),
        _operator("channel_overlap", _MIXTURE, _MIXTURE, _OF_CHANNELS, "value row_lse"),
        _operator("assign", _COMPONENTS, _MIXTURE, [_INDEX]),
        _operator("full_overlap_lse", _MATRICES, _FULL_MIXTURE, [_ROW_LSE], "row_lse"),
        _operator("full_self_overlap", _FULL_MIXTURE, "", [Output("value"), _ROW_LSE], "value row_lse"),
        _operator("full_pairwise", _MATRICES, _MATRICES, [_DENSITIES]),
        _operator("full_channel_overlap", _FULL_MIXTURE, _FULL_MIXTURE, _OF_CHANNELS, "value row_lse"),
        _operator("full_assign", _MATRICES, _FULL_MIXTURE, [_INDEX]),
    )
}  # fmt: skip
