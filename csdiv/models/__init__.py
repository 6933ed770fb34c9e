"""The Cauchy–Schwarz regularized autoencoder: plain modules here; training, evaluation and report beside them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder, AutoencoderOutput, MixtureVAE, VampPriorVAE
    from csdiv.models.checkpoint import load_model
    from csdiv.models.data import Dataset, load_data
    from csdiv.models.initialisation import initialize_from_codes_
    from csdiv.models.multiplier import ConstraintMultiplier
    from csdiv.models.networks import BernoulliDecoder, Decoder, Encoder, GaussianDecoder, build_networks

_MODULES = {
    "CSRAE": "autoencoder",
    "VAE": "autoencoder",
    "Autoencoder": "autoencoder",
    "AutoencoderOutput": "autoencoder",
    "BernoulliDecoder": "networks",
    "ConstraintMultiplier": "multiplier",
    "Dataset": "data",
    "Decoder": "networks",
    "Encoder": "networks",
    "GaussianDecoder": "networks",
    "MixtureVAE": "autoencoder",
    "VampPriorVAE": "autoencoder",
    "build_networks": "networks",
    "initialize_from_codes_": "initialisation",
    "load_data": "data",
    "load_model": "checkpoint",
}

__all__ = [
    "CSRAE",
    "VAE",
    "Autoencoder",
    "AutoencoderOutput",
    "BernoulliDecoder",
    "ConstraintMultiplier",
    "Dataset",
    "Decoder",
    "Encoder",
    "GaussianDecoder",
    "MixtureVAE",
    "VampPriorVAE",
    "build_networks",
    "initialize_from_codes_",
    "load_data",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """Imported when first used, so that the command's help does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'csdiv.models' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"csdiv.models.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
