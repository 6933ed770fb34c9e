"""A run on disk: tensors in model.safetensors, how to build the model in config.json, its options in config.toml.

Nothing is unpickled. What a run resumes from, resume.ckpt, is Lightning's, read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

import csdiv
from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder, MixtureVAE, VampPriorVAE
from csdiv.models.config import CHOICES, TrainConfig, read_toml, to_toml
from csdiv.models.data import Dataset, read_tensors
from csdiv.models.networks import build_networks
from csdiv.nn import GaussianMixturePrior

WEIGHTS, CONFIG, OPTIONS, RESUME = "model.safetensors", "config.json", "config.toml", "resume.ckpt"


def build_model(
    *,
    model: str,
    architecture: str,
    likelihood: str,
    sample_shape: list[int],
    latent_dim: int,
    hidden_dim: int,
    num_components: int,
    divergence_weight: float,
    self_overlap_interval: int = 1,
) -> Autoencoder:
    """The model of these options; ``self_overlap_interval`` is the "csrae"'s, "vae" has no components.

    Raises:
        ValueError: an unknown name.
    """
    encoder, decoder = build_networks(architecture, likelihood, sample_shape, latent_dim, hidden_dim)
    if model == "vae":
        return VAE(encoder, decoder, divergence_weight)
    if model == "vampprior":
        return VampPriorVAE(encoder, decoder, torch.rand(num_components, math.prod(sample_shape)), divergence_weight)
    prior = GaussianMixturePrior(num_components, latent_dim)
    if model == "mixture_vae":
        return MixtureVAE(encoder, decoder, prior, divergence_weight)
    if model == "csrae":
        return CSRAE(encoder, decoder, prior, divergence_weight, self_overlap_interval=self_overlap_interval)
    raise ValueError(f"model: one of {', '.join(CHOICES['model'])} expected, got {model!r}")


def model_options(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    """The arguments of :func:`build_model`. Raises: ValueError for a likelihood that the data cannot have."""
    names = ("model", "architecture", "latent_dim", "hidden_dim", "num_components", "divergence_weight")
    likelihood = data.likelihood if config.likelihood == "auto" else config.likelihood
    if likelihood == "bernoulli" != data.likelihood:
        raise ValueError("likelihood 'bernoulli': data in [0, 1] expected")
    return {
        "likelihood": likelihood,
        "sample_shape": list(data.sample_shape),
        "self_overlap_interval": config.self_overlap_interval,
    } | {name: getattr(config, name) for name in names}


def versions() -> dict[str, str]:
    """Of csdiv and of what a run depends on."""
    found = {"csdiv": csdiv.__version__}
    for name in ("torch", "lightning", "numpy", "scikit-learn", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


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
        with contextlib.suppress(FileNotFoundError):  # interrupted when it was renamed already
            os.unlink(temporary)
        raise


def save_config(directory: Path, config: TrainConfig, data: Dataset) -> None:
    """Writes config.json, how to build the model, and config.toml, the options of the run; versions in both."""
    sizes = {"train": len(data.train.x), "validation": len(data.validation.x), "test": len(data.test.x)}
    content = {"versions": versions(), "model": model_options(config, data), "data": {"name": data.name} | sizes}
    write_atomically(directory / CONFIG, json.dumps(content, indent=2) + "\n")
    write_atomically(directory / OPTIONS, to_toml(config, versions()))


def save_weights(directory: Path, model: Autoencoder) -> None:
    """Writes model.safetensors."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(directory / WEIGHTS, safetensors.torch.save(state))


def load_config(directory: str | Path) -> TrainConfig:
    """The options of a run.

    Raises:
        FileNotFoundError: no config.toml. ValueError: it is malformed.
    """
    path = Path(directory) / OPTIONS
    try:
        return TrainConfig(**read_toml(path))
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def load_model(directory: str | Path) -> Autoencoder:
    """The model of a run's output directory, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, malformed, or the weights belong to another model.
    """
    directory = Path(directory)
    try:
        model = build_model(**_read_config(directory)["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG}: not a csdiv configuration ({error})") from error
    try:
        state = safetensors.torch.load((directory / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS}: truncated or not safetensors ({error})") from error
    check_weights(directory / WEIGHTS, state, model.state_dict())
    model.load_state_dict(state)
    return model.eval()


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json, which ``save_config`` wrote."""
    content = json.loads((directory / CONFIG).read_text())
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("no model in it")
    return content


def check_data(directory: Path, config: TrainConfig, data: Dataset) -> None:
    """Raises a ValueError unless the data are those of the run: by shape, splits and range."""
    found = _read_config(directory)
    sizes = {"train": len(data.train.x), "validation": len(data.validation.x), "test": len(data.test.x)}
    same = all(found.get("data", {}).get(name) == size for name, size in sizes.items())
    if not same or found["model"] != json.loads(json.dumps(model_options(config, data))):
        raise ValueError(
            f"{directory}: the data {config.data!r} are not those of the run ({sizes}, {data.sample_shape})"
        )


def check_weights(source: Path | str, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises a ValueError unless both have the same names and shapes."""
    found, wanted = ({name: tuple(t.shape) for name, t in side.items()} for side in (state, expected))
    if found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise ValueError(f"{source}: weights of another model ({', '.join(wrong)} differ)")


def save_resume_state(state: dict[str, Any], path: Path) -> None:
    """Writes tensors, numbers and names, of which ``load_resume_state`` reads no more."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_resume_state(path: Path, map_location: Callable[..., Any] | torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save_resume_state`` wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: nothing to resume from. ValueError: truncated, or with unexpected content.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path} to resume from")
    try:
        state = read_tensors(path, map_location)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise ValueError(f"{path}: not a checkpoint of csdiv")
    return state
