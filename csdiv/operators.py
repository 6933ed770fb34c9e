"""The table of operators: what each takes, gives, saves and differentiates.

Schemas, fakes, autograd functions, vmap rules and the calls of every backend follow from it. One order holds
everywhere, in csrc/bindings.cpp as well: the gradient of the value, the outputs, the tensors of p, the tensors of q,
each side's weights last, the tensors of neither. :class:`csdiv.backends.base.Backend` describes the tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_EVENT_DIMS = {"means": 2, "variances": 2, "log_variances": 2, "covariances": 3, "factors": 3, "log_weights": 1}
"""Dimensions of a tensor of each kind beside those of the batch; the log weights of channels have one more."""


class Output(NamedTuple):
    """A tensor (*batch, *sizes)."""

    name: str
    sizes: str = ""  # letters: N and M components, C and E channels of p and q; or a digit
    dtype: torch.dtype | None = None  # None: that of the tensors
    without: str | None = None  # a tensor whose batch dimensions this output does not have


class Other(NamedTuple):
    """A tensor (*batch, *sizes) that is neither p's nor q's; each of its sizes may be 1 instead."""

    name: str
    sizes: str  # letters as of outputs, and D dimensions
    dtype: torch.dtype | None = None  # None: that of the tensors of p and q
    optional: bool = False


class Operator(NamedTuple):
    """One operator. Its first output is the value, which gradients are of; "assign" and "factored_assign" have none.

    An output "offset" is the second part of a logarithm: it is to be added to the value.
    """

    name: str
    p: tuple[str, ...]  # p's tensors, as csdiv.reference.Components names them
    q: tuple[str, ...]  # q's; none: p with itself
    others: tuple[Other, ...]  # after the tensors of p and q
    outputs: tuple[Output, ...]
    has_offset: bool  # whether the second output is an offset
    saved: tuple[int, ...]  # which outputs the backward pass takes
    at_once: str  # what the forward pass can return gradients of: "scalars", the sum of the "rows", or "nothing"
    names: tuple[str, ...]  # of all tensors
    event_dims: tuple[int, ...]  # of all tensors
    full: bool  # whether it takes full covariances, or factors of them, all in float64
    channels: bool  # whether each side has several weightings, log weights (*batch, C, K), of its components


def _operator(
    name: str,
    p: str,
    q: str,
    outputs: tuple[Output, ...],
    saved: str = "",
    at_once: str = "nothing",
    others: tuple[Other, ...] = (),
) -> Operator:
    sides, channels = (tuple(p.split()), tuple(q.split())), "channel_" in name
    names = tuple(f"{side}_{kind}" for side, kinds in zip("pq", sides, strict=True) for kind in kinds)
    event_dims = tuple(_EVENT_DIMS[k] + (channels and k == "log_weights") for kinds in sides for k in kinds)
    names += tuple(other.name for other in others)
    event_dims += tuple(len(other.sizes) for other in others)
    back = tuple(k for k, output in enumerate(outputs) if output.name in saved.split())
    full = "covariances" in sides[0] or "factors" in sides[1]
    has_offset = len(outputs) > 1 and outputs[1].name == "offset"
    return Operator(name, *sides, others, outputs, has_offset, back, at_once, names, event_dims, full, channels)


_PART, _MIXTURE = "means variances", "means variances log_weights"
_FULL_PART, _FULL_MIXTURE = "means covariances", "means covariances log_weights"
_CODES = "means log_variances"
_POINTS, _FACTORED_PART, _FACTORED_MIXTURE = "means", "means factors", "means factors log_weights"
_F64 = torch.float64
_LOG, _ROW_LSE = (Output("value", "", _F64), Output("offset", "", _F64)), Output("row_lse", "N")
_KNOWN, _SELF_OVERLAP = Other("q_self_overlap", "", _F64, optional=True), Output("self_overlap", "", _F64)
_DIVERGENCES = (Output("value", "N"), _ROW_LSE, _SELF_OVERLAP)
_ROW_OFFSET, _OVERLAPS = Output("offset", "1", _F64), Output("overlaps", "3", _F64)  # log V(p, q), V(p, p), V(q, q)
_DENSITIES, _INDEX = (Output("value", "NM"),), (Output("value", "N", torch.int64),)
_OF_CHANNELS = (Output("value", "CE", _F64), Output("offset", "CE", _F64))
_CHANNELS = (*_OF_CHANNELS, Output("row_lse", "NE", _F64, "p_log_weights"))
_OWN_CHANNELS = (*_OF_CHANNELS, Output("row_lse", "NE", _F64))

_ALL = (
    _operator("overlap_lse", _PART, _MIXTURE, (_ROW_LSE, _ROW_OFFSET), "row_lse offset", "rows"),
    _operator("log_overlap", _MIXTURE, _MIXTURE, (*_LOG, _ROW_LSE), "value row_lse", "scalars"),
    _operator("self_overlap", _MIXTURE, "", _LOG, "value", "scalars"),
    _operator(
        "cs_divergence", _MIXTURE, _MIXTURE, (Output("value"), _ROW_LSE, _OVERLAPS), "row_lse overlaps", "scalars"
    ),
    _operator("regularizer", _CODES, _MIXTURE, _DIVERGENCES, "row_lse self_overlap", "rows", (_KNOWN,)),
    _operator("component_divergence", _PART, _MIXTURE, _DIVERGENCES, "row_lse self_overlap", "rows", (_KNOWN,)),
    _operator("pairwise", _PART, _PART, _DENSITIES),
    _operator("channel_overlap", _MIXTURE, _MIXTURE, _CHANNELS, "value row_lse"),
    _operator("channel_self_overlap", _MIXTURE, "", _OWN_CHANNELS, "value row_lse"),
    _operator("assign", _PART, _MIXTURE, _INDEX),
    _operator("full_overlap_lse", _FULL_PART, _FULL_MIXTURE, (_ROW_LSE,), "row_lse"),
    _operator("full_self_overlap", _FULL_MIXTURE, "", (Output("value"), _ROW_LSE), "value row_lse"),
    _operator("full_pairwise", _FULL_PART, _FULL_PART, _DENSITIES),
    _operator("full_channel_overlap", _FULL_MIXTURE, _FULL_MIXTURE, _CHANNELS, "value row_lse"),
    _operator("full_channel_self_overlap", _FULL_MIXTURE, "", _OWN_CHANNELS, "value row_lse"),
    _operator("full_assign", _FULL_PART, _FULL_MIXTURE, _INDEX),
    _operator("factored_overlap_lse", _POINTS, _FACTORED_MIXTURE, (_ROW_LSE,), "row_lse"),
    _operator("factored_pairwise", _POINTS, _FACTORED_PART, _DENSITIES),
    _operator("factored_assign", _POINTS, _FACTORED_MIXTURE, _INDEX),
)
OPERATORS = {operator.name: operator for operator in _ALL}
