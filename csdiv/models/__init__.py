"""The Cauchy–Schwarz regularized autoencoder: plain modules here; training, evaluation and report beside them."""

from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder, AutoencoderOutput
from csdiv.models.initialisation import initialize_from_codes_
from csdiv.models.networks import BernoulliDecoder, GaussianEncoder

__all__ = [
    "CSRAE",
    "VAE",
    "Autoencoder",
    "AutoencoderOutput",
    "BernoulliDecoder",
    "GaussianEncoder",
    "initialize_from_codes_",
]
