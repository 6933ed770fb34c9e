"""A run on disk: tensors in model.safetensors, how to build the model in config.json, its options in config.toml.

Nothing is unpickled. What a run resumes from, resume.ckpt, is Lightning's, read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import csdiv
from csdiv.models import folder
from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder, MixtureVAE, VampPriorVAE
from csdiv.models.config import CHOICES, TrainConfig, check_path, check_value, read_toml, to_toml
from csdiv.models.data import Dataset
from csdiv.models.folder import CONFIG, OPTIONS, WEIGHTS
from csdiv.models.networks import build_networks
from csdiv.models.readers import check_memory, read_tensors
from csdiv.nn import GaussianMixturePrior

CHECKSUM = "sha256"  # in the metadata of safetensors
RESUME_FIELDS = {
    "state_dict": dict, "epoch": int, "global_step": int, "loops": dict, "callbacks": dict,
    "optimizer_states": list, "lr_schedulers": list,
}  # fmt: skip


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


def save_config(directory: Path, config: TrainConfig, data: Dataset) -> None:
    """Writes config.json, how to build the model, and config.toml, the options of the run; versions in both."""
    sizes = {"train": len(data.train.x), "validation": len(data.validation.x), "test": len(data.test.x)}
    content = {"versions": versions(), "model": model_options(config, data), "data": {"name": data.name} | sizes}
    folder.write(directory, CONFIG, json.dumps(content, indent=2) + "\n")
    folder.write(directory, OPTIONS, to_toml(config, versions()))


def save_weights(directory: Path, model: nn.Module, name: str = WEIGHTS) -> None:
    """Writes model.safetensors, or the file of another name, with the checksum of its tensors."""
    state = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    content = safetensors.torch.save(state, {CHECKSUM: _checksum(state)})
    folder.write(directory, name, content)


def _checksum(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, t in sorted(state.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(path: Path, model: nn.Module) -> None:
    """Replaces the parameters and buffers of a model, which may be on the device "meta", by those of a file.

    Shapes are compared before memory is taken.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is truncated or damaged, of another model, or has values that are not finite.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path}: truncated or not safetensors (empty)")
    expected = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            check_weights(path, shapes, expected)
            state = {name: file.get_tensor(name).clone() for name in shapes}
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not safetensors ({error})") from error
    if checksum is not None and checksum != _checksum(state):
        raise ValueError(f"{path}: damaged, its checksum is wrong")
    check_finite(path, state)
    model.load_state_dict({name: t.to(expected[name].dtype) for name, t in state.items()}, assign=True)


def load_config(directory: str | Path) -> TrainConfig:
    """The options of a run.

    Raises:
        FileNotFoundError: no config.toml. ValueError: it is malformed.
    """
    path = Path(directory) / OPTIONS
    values = read_toml(path)
    try:
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_model(directory: str | Path) -> Autoencoder:
    """The model of a run's output directory, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, damaged or malformed; the weights belong to another model or are not finite.
    """
    directory = Path(check_path("directory", str(directory)))  # safetensors opens no others
    options = read_model_options(directory)
    try:
        model = build_without_memory(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG}: not a csdiv configuration ({error})") from error
    load_weights(directory / WEIGHTS, model)
    return model.eval()


def build_without_memory(options: dict[str, Any]) -> Autoencoder:
    """The model of :func:`build_model` on the device "meta". Raises: ValueError: no such model; beyond 64 bits."""
    try:
        with torch.device("meta"):
            return build_model(**options)
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"a model of such sizes cannot be: {error}") from error


def check_size(options: dict[str, Any]) -> None:
    """Raises a ValueError if a model, with gradients and Adam's moments, has no room in this machine's memory."""
    weights = sum(t.numel() * t.element_size() for t in build_without_memory(options).state_dict().values())
    check_memory(weights * (1 if torch.cuda.is_available() else 4), "training this model")


def read_model_options(directory: Path) -> dict[str, Any]:
    """The arguments of :func:`build_model`, of config.json. Raises: FileNotFoundError. ValueError: malformed."""
    options = _read_config(directory)["model"]
    try:
        sizes = options["sample_shape"]
        if not isinstance(sizes, list) or not all(type(n) is int and 0 < n < 2**63 for n in sizes) or not sizes:
            raise ValueError(f"sample_shape: a list of positive integers expected, got {sizes!r}")
        own = {name: value for name, value in options.items() if name not in ("sample_shape", "likelihood")}
        return options | {name: check_value(name, value) for name, value in own.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / CONFIG}: not a csdiv configuration ({error})") from error


def _read_config(directory: Path) -> dict[str, Any]:
    """config.json, which ``save_config`` wrote."""
    content = folder.read_json(directory / CONFIG)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{directory / CONFIG}: not a csdiv configuration (no model in it)")
    return content


def check_data(directory: Path, config: TrainConfig, data: Dataset) -> None:
    """Raises a ValueError unless options and data are those of the run: by shape, splits and range."""
    found, options = _read_config(directory), model_options(config, data)
    given = found.get("data")
    sizes = {"train": len(data.train.x), "validation": len(data.validation.x), "test": len(data.test.x)}
    same = isinstance(given, dict) and all(given.get(name) == size for name, size in sizes.items())
    of_data = ("sample_shape", "likelihood")
    if not same or any(found["model"].get(name) != options[name] for name in of_data):
        raise ValueError(
            f"{directory}: the data {config.data!r} are not those of the run ({sizes}, {data.sample_shape})"
        )
    if wrong := sorted(name for name in options if found["model"].get(name) != options[name]):
        raise ValueError(f"{directory}: {OPTIONS} and {CONFIG} have different {', '.join(wrong)}")


def check_weights(source: Path | str, shapes: dict[str, tuple[int, ...]], expected: dict[str, Tensor]) -> None:
    """Raises a ValueError unless both have the same names and shapes."""
    wanted = {name: tuple(t.shape) for name, t in expected.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
        raise ValueError(f"{source}: weights of another model ({', '.join(wrong)} differ)")


def check_finite(source: Path | str, state: dict[str, Tensor]) -> None:
    """Raises a ValueError that names the first of the weights that are not all finite numbers."""
    for name, t in state.items():
        if not t.is_floating_point() or not t.isfinite().all():
            raise ValueError(f"{source}: finite numbers expected in {name}")


def save_resume_state(state: dict[str, Any], path: Path) -> None:
    """Writes tensors, numbers and names, and ``load_resume_state`` reads no more; with checksums, as zip files do."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder.write(path.parent, path.name, buffer.getvalue())


def load_resume_state(path: Path, map_location: Callable[..., Any] | torch.device | str = "cpu") -> dict[str, Any]:
    """What ``save_resume_state`` wrote; nothing in the file is executed.

    Raises:
        FileNotFoundError: nothing to resume from. ValueError: truncated, damaged, or with unexpected content.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no {path} to resume from")
    try:
        state = read_tensors(path, map_location)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    whole = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in RESUME_FIELDS.items())
    if not whole or not all(isinstance(t, Tensor) for t in state["state_dict"].values()):
        raise ValueError(f"{path}: not a checkpoint of csdiv")
    return state


def check_resume_state(path: Path | str, state: dict[str, Any], module: nn.Module, epochs: int) -> None:
    """Raises a ValueError unless a state of at most these epochs fits a module, which may be on the device "meta"."""
    weights, expected = state["state_dict"], module.state_dict()
    check_weights(path, {name: tuple(t.shape) for name, t in weights.items()}, expected)
    check_finite(path, {name: t for name, t in weights.items() if name.startswith("model.")})
    shapes = dict(enumerate(p.shape for p in module.parameters()))  # those without gradients so far have no moments
    try:
        moments = state["optimizer_states"][0]["state"].items()
        same = all(m["exp_avg"].shape == m["exp_avg_sq"].shape == shapes[i] for i, m in moments)
    except (KeyError, IndexError, TypeError, AttributeError):
        same = False
    if not same or not 0 <= state["epoch"] <= epochs or state["global_step"] < 0:
        raise ValueError(f"{path}: the state of another run")
