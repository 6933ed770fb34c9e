"""The autoencoders: one body, and the divergence from codes to prior that tells them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csdiv import GaussianMixture, cs_regularizer
from csdiv.models.networks import BernoulliDecoder, GaussianEncoder
from csdiv.nn import GaussianMixturePrior


@dataclass(frozen=True)
class AutoencoderOutput:
    """What a forward pass gives.

    Attributes:
        loss: (), mean over the batch of reconstruction + divergence_weight * divergence, nats.
        reconstruction: (B,) −log p(x|z) at the sampled code, summed over pixels, nats.
        divergence: (B,) from q(z|x) to the prior, nats.
        codes: (B, D) the sampled codes.
        log_variances: (B, D) of q(z|x).
    """

    loss: Tensor
    reconstruction: Tensor
    divergence: Tensor
    codes: Tensor
    log_variances: Tensor


class Autoencoder(nn.Module):
    """Encoder, decoder and a prior; a subclass says what the prior and the divergence are.

    loss = mean_b [ −log p(x_b|z_b) + λ · divergence(q(z|x_b), prior) ],  z_b ~ q(z|x_b)

    Args:
        encoder: x (B, P) -> means, log_variances (B, D), as :class:`GaussianEncoder`.
        decoder: with forward and negative_log_likelihood, as :class:`BernoulliDecoder`.
        divergence_weight: λ ≥ 0.
    """

    def __init__(self, encoder: GaussianEncoder, decoder: BernoulliDecoder, divergence_weight: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.decoder, self.divergence_weight = encoder, decoder, divergence_weight

    def prior_mixture(self) -> GaussianMixture:
        """p(z) with K components in D dimensions."""
        raise NotImplementedError

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        """From each N(m_b, diag s_b) to the prior: (B, D), (B, D) -> (B,) nats."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> AutoencoderOutput:
        means, log_variances = self.encoder(x)
        codes = means + (0.5 * log_variances).exp() * torch.randn_like(means)
        reconstruction = self.decoder.negative_log_likelihood(codes, x)
        divergence = self.divergence(means, log_variances)
        loss = (reconstruction + self.divergence_weight * divergence).mean()
        return AutoencoderOutput(loss, reconstruction, divergence, codes, log_variances)

    @torch.no_grad()
    def encode(self, x: Tensor) -> GaussianMixture:
        """The codes q(z|x_b) of a batch (B, P) as the B components of one mixture, the form that ``assign`` takes."""
        means, log_variances = self.encoder(x)
        return GaussianMixture(means, log_variances.exp())

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded code means of a batch: (B, P) -> pixel means (B, P)."""
        return self.decoder(self.encoder(x)[0])

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Pixel means (n, P) of n codes drawn from the prior."""
        return self.decoder(self.prior_mixture().sample(n))

    @torch.no_grad()
    def prototypes(self) -> Tensor:
        """Pixel means (K, P) of the decoded component means."""
        return self.decoder(self.prior_mixture().means)


class VAE(Autoencoder):
    """Variational autoencoder: prior N(0, I), divergence KL(q(z|x) || N(0, I)); λ is the β of a β-VAE."""

    def prior_mixture(self) -> GaussianMixture:
        like = next(self.parameters())
        return GaussianMixture(like.new_zeros(1, self.encoder.latent_dim), like.new_ones(1, 1))

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        return 0.5 * (means**2 + log_variances.exp() - log_variances - 1).sum(-1)


class CSRAE(Autoencoder):
    """Cauchy–Schwarz regularized autoencoder: a learned mixture prior, divergence D_CS(q(z|x), prior).

    λ = 2 matches the evidence bound of a VAE in its effect on the encoder's variance; λ = 1 acts like β = ½.

    Args:
        encoder, decoder, divergence_weight: see :class:`Autoencoder`.
        prior: the mixture p(z), trained along with the networks.

    Source: Tran, Pantic, Deisenroth, "Cauchy–Schwarz Regularized Autoencoder", JMLR 23(115), 2022.
    """

    def __init__(
        self,
        encoder: GaussianEncoder,
        decoder: BernoulliDecoder,
        prior: GaussianMixturePrior,
        divergence_weight: float = 1.0,
    ) -> None:
        super().__init__(encoder, decoder, divergence_weight)
        self.prior = prior

    def prior_mixture(self) -> GaussianMixture:
        return self.prior()

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        return cs_regularizer(means, log_variances, self.prior)
