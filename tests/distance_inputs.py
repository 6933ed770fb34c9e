"""What tests of distances and of channels share."""

import pytest
import torch
from entries import BACKENDS
from torch import Tensor

from csdiv import GaussianMixture, testing

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
close = torch.testing.assert_close


def mixture(k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, **{"dtype": torch.float64} | options)


def inputs_of(*sides: GaussianMixture) -> list[Tensor]:
    return [t for side in sides for t in side._tensors()]
