"""Which backend "auto" prefers for a problem, and why: one table.

Nothing has been measured on a GPU yet, so what it says of GPUs comes from counts of machine instructions
(``python -m bench static``, docs/kernels.md). A measurement may change a line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from csdiv.kernels.configurations import MATRIX_DIM  # which imports no triton

MATRIX_PAIRS = 2**20
"""From where on matrix products pay: pairs that keep a GPU busy for longer than launches take."""


class Shape(NamedTuple):
    """What the choice depends on beside the device; every size that is not known yet is 0."""

    n: int = 0
    m: int = 0
    dim: int = 0
    structure: str = "diagonal"  # of both sides, one of csdiv.kernels.configurations.STRUCTURES


class Rule(NamedTuple):
    """A line of the table."""

    device: str
    applies: Callable[[Shape], bool]
    order: tuple[str, ...]  # the best one first; the first that can run is taken
    why: str


RULES = (
    Rule("cpu", lambda shape: True, ("cpu",), "it alone computes on CPU tensors"),
    Rule(
        "cuda",
        lambda shape: shape.structure != "diagonal" and shape.dim >= MATRIX_DIM and shape.n * shape.m >= MATRIX_PAIRS,
        ("cuda", "triton"),
        f"one variance for each component, or for all of a side in each dimension, D >= {MATRIX_DIM} and N M >= 2^20: "
        "triton has forms for these, with fewer instructions for an element, but cuda stays first until a GPU has "
        "confirmed their speed and their error bound",
    ),
    Rule(
        "cuda",
        lambda shape: True,
        ("cuda", "triton"),
        "fewer instructions for an element than triton, and one pass over the pairs for the gradients of both sides",
    ),
)


def rule_of(device: str, shape: Shape) -> Rule | None:
    """The first line that applies; None: there is nothing but the reference for this kind of device."""
    return next((rule for rule in RULES if rule.device == device and rule.applies(shape)), None)


def order_of(device: str, shape: Shape) -> tuple[str, ...]:
    """The backends for a problem, the best one first."""
    rule = rule_of(device, shape)
    return rule.order if rule else ()
