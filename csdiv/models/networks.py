"""Encoders and decoders: diagonal Gaussian codes; Bernoulli or Gaussian likelihoods; perceptrons or convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHITECTURES = ("mlp", "conv")
LIKELIHOODS = ("bernoulli", "gaussian")
NOISE_FLOOR = 1e-4  # of a Gaussian likelihood's variance, relative to the data's


class Encoder(nn.Module):
    """q(z|x) = N(m(x), diag s(x)).

    Args:
        layers: x (*batch, P) -> (*batch, 2 D), the code means and log variances side by side.
        latent_dim: D.

    Shape:
        x (*batch, P) -> means (*batch, D), log_variances (*batch, D).
    """

    def __init__(self, layers: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.layers, self.latent_dim = layers, latent_dim

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        means, log_variances = self.layers(x).chunk(2, dim=-1)
        return means, log_variances


class Decoder(nn.Module):
    """p(x|z); a subclass is one likelihood.

    Args:
        layers: z (*batch, D) -> (*batch, P).

    Shape:
        z (*batch, D) -> means of x (*batch, P).
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def negative_log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        """−log p(x|z), summed over features: z (*batch, D), x broadcastable to (*batch, P) -> (*batch,) nats."""
        raise NotImplementedError


class BernoulliDecoder(Decoder):
    """p(x|z) = Π_p Bernoulli(x_p; sigmoid(layers(z)_p)), x in {0, 1}; for x between them a loss, no likelihood."""

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).sigmoid()

    def negative_log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.layers(z)
        if not logits.requires_grad and x.ndim == 1:  # many codes of one sample: a product instead of two temporaries
            return F.softplus(logits).sum(-1) - logits @ x
        return F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)


class GaussianDecoder(Decoder):
    """p(x|z) = Π_p N(x_p; a_p + b_p layers(z)_p, b_p² (σ² + NOISE_FLOOR)), with one learned log σ².

    Args:
        layers: see :class:`Decoder`.
        shift, scale: (P,) a and b > 0: mean and standard deviation of each feature.

    The likelihood is a density in the units of x.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Module, shift: Tensor, scale: Tensor) -> None:
        super().__init__(layers)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.log_variance = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return self.shift + self.scale * self.layers(z)

    def negative_log_likelihood(self, z: Tensor, x: Tensor) -> Tensor:
        error = (x - self.shift) / self.scale - self.layers(z)
        variance = self.log_variance.exp() + NOISE_FLOOR
        constant = 0.5 * x.shape[-1] * (math.log(2 * math.pi) + variance.log()) + self.scale.log().sum()
        return 0.5 * error.square().sum(-1) / variance + constant


class Standardize(nn.Module):
    """(x − shift) / scale."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


class OnImages(nn.Module):
    """Convolutions for vectors: (*batch, P) is reshaped to images (B, C, H, W), the result to (*batch, rest)."""

    def __init__(self, layers: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.shape = layers, tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.reshape(-1, *self.shape))
        return y.reshape(*x.shape[:-1], math.prod(y.shape[1:]))


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths, from input to output, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions(shape: Sequence[int], hidden_dim: int, output_dim: int, channels: int = 32) -> nn.Module:
    """Two convolutions that halve the image (C, H, W), two linear layers: (*batch, C H W) -> (*batch, output_dim)."""
    c, height, width = shape
    return OnImages(
        nn.Sequential(
            nn.Conv2d(c, channels, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            *perceptron([2 * channels * (height // 4) * (width // 4), hidden_dim, output_dim]),
        ),
        shape,
    )


def transposed_convolutions(latent_dim: int, hidden_dim: int, shape: Sequence[int], channels: int = 32) -> nn.Module:
    """The mirror image of :func:`convolutions`: (*batch, D) -> (*batch, CHW)."""
    c, height, width = shape
    small = (height // 4, width // 4)
    # What halving lost comes back: an odd side has one pixel more than twice its half.
    odd = ((height // 2 % 2, width // 2 % 2), (height % 2, width % 2))
    return OnImages(
        nn.Sequential(
            *perceptron([latent_dim, hidden_dim, 2 * channels * small[0] * small[1]]),
            nn.ReLU(),
            nn.Unflatten(-1, (2 * channels, *small)),
            nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, output_padding=odd[0]),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, c, 4, 2, 1, output_padding=odd[1]),
        ),
        (latent_dim,),
    )


def build_networks(
    architecture: str, likelihood: str, sample_shape: Sequence[int], latent_dim: int, hidden_dim: int
) -> tuple[Encoder, Decoder]:
    """An encoder and the decoder that mirrors it.

    Args:
        architecture: "mlp", two hidden layers; "conv", for images of at least 4 x 4 pixels.
        likelihood: "bernoulli" or "gaussian"; the latter's shift and scale are 0 and 1 until they are set.
        sample_shape: (P,) or (C, H, W) of a sample, which is a vector of as many features everywhere else.
        latent_dim: D.
        hidden_dim: width of the hidden linear layers.

    Raises:
        ValueError: an unknown name, or convolutions for samples that are no images of that size.
    """
    size = math.prod(sample_shape)
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood: one of {', '.join(map(repr, LIKELIHOODS))} expected, got {likelihood!r}")
    inner: nn.Module
    outer: nn.Module
    if architecture == "mlp":
        inner = perceptron([size, hidden_dim, hidden_dim, 2 * latent_dim])
        outer = perceptron([latent_dim, hidden_dim, hidden_dim, size])
    elif architecture == "conv":
        if len(sample_shape) != 3 or min(sample_shape[1:]) < 4:
            raise ValueError(f"architecture 'conv': images of 4 x 4 pixels or more expected, got {tuple(sample_shape)}")
        inner = convolutions(sample_shape, hidden_dim, 2 * latent_dim)
        outer = transposed_convolutions(latent_dim, hidden_dim, sample_shape)
    else:
        raise ValueError(f"architecture: one of {', '.join(map(repr, ARCHITECTURES))} expected, got {architecture!r}")
    if likelihood == "bernoulli":
        return Encoder(inner, latent_dim), BernoulliDecoder(outer)
    shift, scale = torch.zeros(size), torch.ones(size)
    encoder = Encoder(nn.Sequential(Standardize(shift.clone(), scale.clone()), inner), latent_dim)
    return encoder, GaussianDecoder(outer, shift, scale)


@torch.no_grad()
def standardize_(encoder: Encoder, decoder: Decoder, x: Tensor) -> int:
    """Sets the shift and scale of Gaussian networks to the mean and standard deviation of each feature of x (n, P).

    A constant feature keeps the scale 1, which changes nothing but its unit.

    Returns:
        the number of constant features.
    """
    scale, shift = torch.std_mean(x.double(), 0, correction=0)
    constant = scale <= 1e-6 * x.abs().amax(0).double()
    scale[constant] = 1.0
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, Standardize | GaussianDecoder):
            module.shift.copy_(shift)
            module.scale.copy_(scale)
    return int(constant.sum())
