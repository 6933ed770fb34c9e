"""A model on disk: tensors in model.safetensors, how to build it in config.json. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import csdiv
from csdiv.models.autoencoder import CSRAE
from csdiv.models.config import TrainConfig
from csdiv.models.networks import BernoulliDecoder, GaussianEncoder
from csdiv.nn import GaussianMixturePrior

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def build_csrae(
    num_pixels: int, latent_dim: int, hidden_dim: int, num_components: int, divergence_weight: float
) -> CSRAE:
    """A CSRAE with two hidden layers of one width in encoder and decoder."""
    hidden = (hidden_dim, hidden_dim)
    return CSRAE(
        GaussianEncoder(num_pixels, latent_dim, hidden),
        BernoulliDecoder(num_pixels, latent_dim, hidden),
        GaussianMixturePrior(num_components, latent_dim),
        divergence_weight,
    )


def model_options(config: TrainConfig, num_pixels: int) -> dict[str, Any]:
    """The arguments of :func:`build_csrae`."""
    names = ("latent_dim", "hidden_dim", "num_components", "divergence_weight")
    return {"num_pixels": num_pixels} | {name: getattr(config, name) for name in names}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in full or not at all: to a temporary file beside it, then renamed."""
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save_config(directory: Path, config: TrainConfig, num_pixels: int) -> None:
    """Writes config.json: versions, how to build the model, and the options of the run."""
    content = {
        "csdiv": csdiv.__version__,
        "model": model_options(config, num_pixels),
        "training": asdict(config) | {"output_dir": str(config.output_dir)},
    }
    write_atomically(directory / CONFIG, json.dumps(content, indent=2) + "\n")


def save_weights(directory: Path, model: CSRAE) -> None:
    """Writes model.safetensors."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(directory / WEIGHTS, safetensors.torch.save(state))


def load_model(directory: str | Path) -> CSRAE:
    """The model of a run's output directory, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, malformed, or the weights belong to another model.
    """
    directory = Path(directory)
    try:
        model = build_csrae(**json.loads((directory / CONFIG).read_text())["model"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / CONFIG}: not a csdiv configuration ({error})") from error
    try:
        state = safetensors.torch.load((directory / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: truncated or not safetensors ({error})") from error
    if (found := _shapes(state)) != (expected := _shapes(model.state_dict())):
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{directory / WEIGHTS}: weights of another model ({', '.join(wrong)} differ)")
    model.load_state_dict(state)
    return model.eval()


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items()}
