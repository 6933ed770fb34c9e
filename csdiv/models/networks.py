"""Encoder and decoder networks: diagonal Gaussian codes, Bernoulli pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class GaussianEncoder(nn.Module):
    """q(z|x) = N(m(x), diag s(x)) from a multilayer perceptron.

    Args:
        input_dim: number of pixels P.
        latent_dim: D.
        hidden_dims: widths of the hidden layers.

    Shape:
        x (*batch, P) -> means (*batch, D), log_variances (*batch, D).
    """

    def __init__(self, input_dim: int, latent_dim: int, hidden_dims: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.layers = _perceptron([input_dim, *hidden_dims, 2 * latent_dim])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means, log_variances = self.layers(x).chunk(2, dim=-1)
        return means, log_variances


class BernoulliDecoder(nn.Module):
    """p(x|z) = Π_p Bernoulli(x_p; sigmoid(logits_p(z))) from a multilayer perceptron.

    Args:
        output_dim: number of pixels P.
        latent_dim: D.
        hidden_dims: widths of the hidden layers, from the code to the image.

    Shape:
        z (*batch, D) -> pixel means in (0, 1), (*batch, P).
    """

    def __init__(self, output_dim: int, latent_dim: int, hidden_dims: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        self.layers = _perceptron([latent_dim, *hidden_dims, output_dim])

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).sigmoid()

    def negative_log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """−log p(x|z), summed over pixels: z (*batch, D), x (*batch, P) in [0, 1] -> (*batch,) nats."""
        logits = self.layers(z)
        return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
