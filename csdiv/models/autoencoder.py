"""The autoencoders: one body, and the divergence from codes to prior that tells them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csdiv import GaussianMixture, cs_regularizer
from csdiv.models.networks import Decoder, Encoder
from csdiv.nn import GaussianMixturePrior, SelfOverlapExpansion


@dataclass(frozen=True)
class AutoencoderOutput:
    """What a forward pass gives.

    Attributes:
        loss: (), mean over the batch of reconstruction + divergence_weight * regularizer, nats.
        reconstruction: (B,) −log p(x|z) at the sampled code, summed over features, nats.
        regularizer: (B,) divergence from q(z|x) to the prior, nats.
        codes: (B, D) the sampled codes.
        means, log_variances: (B, D) of q(z|x).
    """

    loss: Tensor
    reconstruction: Tensor
    regularizer: Tensor
    codes: Tensor
    means: Tensor
    log_variances: Tensor


class Autoencoder(nn.Module):
    """Encoder, decoder and a prior; a subclass says what the prior and the divergence are.

    loss = mean_b [ −log p(x_b|z_b) + λ · divergence(q(z|x_b), prior) ],  z_b ~ q(z|x_b)

    Args:
        encoder: x (B, P) -> means, log_variances (B, D).
        decoder: with forward and negative_log_likelihood.
        divergence_weight: λ ≥ 0; a buffer, so that a learned one is kept with the weights.
    """

    divergence_weight: Tensor

    def __init__(self, encoder: Encoder, decoder: Decoder, divergence_weight: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("divergence_weight", torch.tensor(float(divergence_weight)))

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
        regularizer = self.divergence(means, log_variances)
        loss = (reconstruction + self.divergence_weight * regularizer).mean()
        return AutoencoderOutput(loss, reconstruction, regularizer, codes, means, log_variances)

    @torch.no_grad()
    def encode(self, x: Tensor, chunk_size: int = 4096) -> GaussianMixture:
        """The codes q(z|x_b) of a batch (B, P) as the B components of one mixture, the form that ``assign`` takes."""
        pieces = [self.encoder(piece) for piece in x.split(chunk_size)]
        means, log_variances = (torch.cat(side) for side in zip(*pieces, strict=True))
        return GaussianMixture(means, log_variances.exp())

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded code means of a batch: (B, P) -> means of x (B, P)."""
        return self.decoder(self.encoder(x)[0])

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Means of x (n, P) at n codes drawn from the prior."""
        return self.decoder(self.prior_mixture().sample(n))

    @torch.no_grad()
    def prototypes(self) -> Tensor:
        """Means of x (K, P) at the component means."""
        return self.decoder(self.prior_mixture().means)

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, num_steps: int) -> Tensor:
        """Means of x (B, num_steps, P) on the lines between the code means of pairs (B, P), (B, P), ends included."""
        first, last = self.encoder(start)[0].unsqueeze(1), self.encoder(end)[0].unsqueeze(1)
        return self.decoder(torch.lerp(first, last, torch.linspace(0, 1, num_steps).to(first).unsqueeze(-1)))


class VAE(Autoencoder):
    """Variational autoencoder: prior N(0, I), divergence KL(q(z|x) || N(0, I)); λ is the β of a β-VAE."""

    def prior_mixture(self) -> GaussianMixture:
        like = next(self.parameters())
        return GaussianMixture(like.new_zeros(1, self.encoder.latent_dim), like.new_ones(1, 1))

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        return 0.5 * (means**2 + log_variances.exp() - log_variances - 1).sum(-1)


class _MonteCarloVAE(Autoencoder):
    """A VAE whose prior has no KL divergence in closed form: one draw for the cross term, q's entropy in closed form.

    KL(q(z|x) || p) ≈ −½ Σ_d [log 2π s_d + 1] − log p(z),  z ~ q(z|x)

    The draw is not the one that is decoded: of two draws the gradient is as unbiased, and its noise, which comes from
    the curvature of either term, does not add up. log p(z) and its gradients are csdiv's.
    """

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        z = means + (0.5 * log_variances).exp() * torch.randn_like(means)
        entropy = 0.5 * (log_variances + (1.0 + math.log(2.0 * math.pi))).sum(-1)
        return -entropy - self.prior_mixture().log_prob(z)


class MixtureVAE(_MonteCarloVAE):
    """Variational autoencoder whose prior is a learned Gaussian mixture; λ is the β of a β-VAE.

    The KL divergence is estimated with one draw, see :class:`_MonteCarloVAE`.

    Args:
        encoder, decoder, divergence_weight: see :class:`Autoencoder`.
        prior: the mixture p(z), trained along with the networks.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, prior: GaussianMixturePrior, divergence_weight: float = 1.0
    ) -> None:
        super().__init__(encoder, decoder, divergence_weight)
        self.prior = prior

    def prior_mixture(self) -> GaussianMixture:
        return self.prior()


class VampPriorVAE(_MonteCarloVAE):
    """Variational autoencoder whose prior is the mean of the codes of K learned pseudo-inputs; λ is a β-VAE's β.

    p(z) = 1/K Σ_k q(z|u_k). The KL divergence is estimated with one draw, see :class:`_MonteCarloVAE`.

    Args:
        encoder, decoder, divergence_weight: see :class:`Autoencoder`.
        pseudo_inputs: (K, P) u at the start, samples for example; learned without bounds.

    Source: Tomczak, Welling, "VAE with a VampPrior", AISTATS 2018.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, pseudo_inputs: Tensor, divergence_weight: float = 1.0
    ) -> None:
        super().__init__(encoder, decoder, divergence_weight)
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())

    def prior_mixture(self) -> GaussianMixture:
        means, log_variances = self.encoder(self.pseudo_inputs)
        return GaussianMixture(means, log_variances.exp())


class CSRAE(Autoencoder):
    """Cauchy–Schwarz regularized autoencoder: a learned mixture prior, divergence D_CS(q(z|x), prior).

    λ = 2 matches the evidence bound of a VAE in its effect on the encoder's variance; λ = 1 acts like β = ½.

    Args:
        encoder, decoder, divergence_weight: see :class:`Autoencoder`.
        prior: the mixture p(z), trained along with the networks.
        self_overlap_interval: n ≥ 1. The prior's log V(p, p) costs K² pairs a step; in training it is computed every n
            calls and expanded to first order between, see :class:`csdiv.nn.SelfOverlapExpansion`. 1 is exact.

    Source: Tran, Pantic, Deisenroth, "Cauchy–Schwarz Regularized Autoencoder", JMLR 23(115), 2022.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        prior: GaussianMixturePrior,
        divergence_weight: float = 1.0,
        *,
        self_overlap_interval: int = 1,
    ) -> None:
        super().__init__(encoder, decoder, divergence_weight)
        if self_overlap_interval < 1:
            raise ValueError(f"self_overlap_interval: at least 1 expected, got {self_overlap_interval}")
        self.prior, self._self_overlap = prior, SelfOverlapExpansion(self_overlap_interval)

    def prior_mixture(self) -> GaussianMixture:
        return self.prior()

    def divergence(self, means: Tensor, log_variances: Tensor) -> Tensor:
        prior, own = self.prior(), None
        if self._self_overlap.interval > 1 and self.training and torch.is_grad_enabled():
            own = self._self_overlap(prior)
        return cs_regularizer(means, log_variances, prior, prior_self_overlap=own)

    def refresh_self_overlap(self) -> None:
        """The next call of ``divergence`` computes log V(p, p), whatever the interval."""
        self._self_overlap.refresh()
