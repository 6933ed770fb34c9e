"""Every entry with its gradients on the backend "cuda", small: what compute-sanitizer watches in bench/gpu_check.py.

Sizes have tiles that are full and tiles that are not, work in one phase and in several, batches that share a side, and
each number of lanes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

PROCESSORS = 2
"""So few that small problems are cut like large ones."""


class Shape(NamedTuple):
    """Components of p and q, dimensions and the batch of p; q is shared."""

    n: int
    m: int
    dim: int
    batch: tuple[int, ...] = ()


SHAPES = (
    Shape(65, 130, 5),
    Shape(3, 40, 16, (2,)),
    Shape(33, 70, 64),
    Shape(64, 128, 32),  # full tiles, full groups of lanes
    Shape(8, 64, 12, (3,)),
)
PHASES = Shape(578, 514, 64)
"""So many sums for each multiprocessor that the sweep has several phases, see csrc/cuda/partition.h."""
FULL_SHAPES = (Shape(33, 7, 1), Shape(7, 70, 3), Shape(40, 9, 5), Shape(9, 20, 7), Shape(5, 9, 12), Shape(3, 5, 32))


def mixtures(shape: Shape, structure: str, dtype: torch.dtype, device: str) -> list[GaussianMixture]:
    g = torch.Generator().manual_seed(0)
    return [
        testing.random_mixture(k, shape.dim, batch_shape=batch, structure=structure, dtype=dtype, generator=g)
        .to(device)
        .map(lambda t: t.detach().requires_grad_())
        for k, batch in ((shape.n, shape.batch), (shape.m, ()))
    ]


def values(p: GaussianMixture, q: GaussianMixture) -> Iterator[Tensor]:
    """Those of every entry, one after the other."""
    yield csdiv.cs_divergence(p, q, backend="cuda")
    yield csdiv.log_overlap(p, backend="cuda")
    yield csdiv.pairwise_log_overlap(p, q, backend="cuda")
    yield csdiv.component_log_overlap(p, q, backend="cuda")
    if p.variances is not None:
        yield csdiv.cs_regularizer(p.means, p.variances.log(), q, backend="cuda")


def gradients(p: GaussianMixture, q: GaussianMixture, value: Tensor) -> None:
    leaves = [t for side in (p, q) for t in (side.means, side.variances, side.scale_tril, side.log_weights)]
    torch.autograd.grad(value.sum(), [t for t in leaves if t is not None], allow_unused=True)


def run(device: str, shapes: tuple[Shape, ...] = SHAPES, full: tuple[Shape, ...] = FULL_SHAPES) -> None:
    """Every entry once for each shape, in float32, and in float64 for the first."""
    for shape in shapes:
        for dtype in (torch.float32, torch.float64)[: 2 if shape == shapes[0] else 1]:
            p, q = mixtures(shape, "diagonal", dtype, device)
            for value in values(p, q):
                gradients(p, q, value)
            q.assign(p.means, backend="cuda")
    for shape in full:
        p, q = mixtures(shape, "full", torch.float64, device)
        for value in values(p, q):
            gradients(p, q, value)
        q.assign(p.means, backend="cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    backend = importlib.import_module("csdiv.backends").resolve("cuda", torch.device(options.device, 0))
    with mock.patch.object(backend, "processors", return_value=PROCESSORS):
        run(options.device)
        p, q = mixtures(PHASES, "diagonal", torch.float32, options.device)
        gradients(p, q, csdiv.log_overlap(p, q, backend="cuda"))
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
