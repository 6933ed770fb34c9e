"""Batch shapes that broadcast."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """As ``torch.broadcast_shapes``, whose first call takes a second: it imports sympy.

    Raises:
        RuntimeError: shapes that do not broadcast.
    """
    if all(shape == shapes[0] for shape in shapes):
        return torch.Size(shapes[0] if shapes else ())
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for axis, size in enumerate(shape, len(result) - len(shape)):
            if size != 1 and result[axis] not in (1, size):
                raise RuntimeError(f"shapes do not broadcast: {', '.join(str(tuple(s)) for s in shapes)}")
            if size != 1:
                result[axis] = size
    return torch.Size(result)
