"""What tests of full covariances share."""

from collections.abc import Callable

import torch
from entries import WITH_FULL
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

FULL = ("full", "tied full")
NATIVE = [name for name in WITH_FULL if name != "reference"]


def call(entry: str, backend: str) -> Callable[..., Tensor]:
    if entry == "self_overlap":
        return lambda p, q: csdiv.log_overlap(p, backend=backend)
    return lambda p, q: getattr(csdiv, entry)(p, q, backend=backend)


def random_pair(n: int, m: int, dim: int, dtype: torch.dtype = torch.float64) -> list[GaussianMixture]:
    g = torch.Generator().manual_seed(n)
    return [testing.random_mixture(k, dim, structure="full", dtype=dtype, generator=g) for k in (n, m)]
