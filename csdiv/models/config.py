"""The options of a training run, stated once: the command's flags and help are made from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CHOICES = {
    "model": ("csrae", "vae", "mixture_vae", "vampprior"),
    "architecture": ("mlp", "conv"),
    "likelihood": ("auto", "bernoulli", "gaussian"),
    "initialisation": ("kmeans", "random"),
    "validation_split": ("random", "last"),
}


class Option(NamedTuple):
    """What an option means, and the values it takes: ≥ at_least, > above, < below."""

    help: str
    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; each is a flag of ``csdiv train`` and a key of its TOML file.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.
    """

    data: Annotated[str, Option("'digits', or a folder of IDX files or images, or an .npz or .pt file.")] = "digits"
    output_dir: Annotated[Path, Option("Directory of all results.")] = Path("runs/digits")
    model: Annotated[
        str, Option("'csrae', 'vae' with the prior N(0, I), or a VAE with the prior 'mixture_vae' or 'vampprior'.")
    ] = "csrae"
    architecture: Annotated[str, Option("'mlp', or 'conv' for images.")] = "mlp"
    likelihood: Annotated[str, Option("'bernoulli', 'gaussian', or 'auto': by the range of the data.")] = "auto"
    num_components: Annotated[int, Option("K, components of the prior.", at_least=1)] = 50
    latent_dim: Annotated[int, Option("D, dimensions of the codes.", at_least=1)] = 10
    hidden_dim: Annotated[int, Option("Width of the hidden layers of encoder and decoder.", at_least=1)] = 256
    epochs: Annotated[int, Option("Passes over the training samples, warm-up included.", at_least=1)] = 200
    warmup_epochs: Annotated[int, Option("Epochs as a VAE, before k-means on the codes.", at_least=0)] = 20
    batch_size: Annotated[int, Option("Samples in one step.", at_least=1)] = 128
    learning_rate: Annotated[float, Option("Peak rate of Adam under a one-cycle schedule.", above=0)] = 3e-3
    divergence_weight: Annotated[
        float, Option("λ; 2 acts like the KL term of a VAE. Of a VAE β, which acts like λ / 2.", at_least=0)
    ] = 1.0
    learn_divergence_weight: Annotated[bool, Option("λ as the multiplier of mean D_CS ≤ ε.")] = False
    target_divergence: Annotated[
        float, Option("ε in nats; 0: the D_CS reached at λ = 2 in as many epochs as the warm-up has.", at_least=0)
    ] = 0.0
    max_divergence_weight: Annotated[float, Option("Cap of a learned λ.", above=0)] = 100.0
    warmup_weight: Annotated[float, Option("β, weight of the warm-up's KL term.", at_least=0)] = 0.1
    initialisation: Annotated[str, Option("Of the prior: 'kmeans' on the codes, or 'random'.")] = "kmeans"
    variance_floor: Annotated[float, Option("Smallest component variance that k-means gives.", above=0)] = 1e-3
    self_overlap_interval: Annotated[
        int, Option("Steps between computations of the prior's K² self term, expanded between.", at_least=1)
    ] = 1
    max_variance_ratio: Annotated[
        float,
        Option(
            "Median s/v, code's over component's variance, that stops a CSRAE in its second half; 0: none.", at_least=0
        ),
    ] = 0.0
    validation_fraction: Annotated[
        float, Option("Of the samples; they choose the weights, if λ is fixed; 0: the last.", at_least=0, below=1)
    ] = 0.1
    validation_split: Annotated[str, Option("Which samples validate: 'random' ones, or the 'last'.")] = "random"
    checkpoint_interval: Annotated[int, Option("Epochs between checkpoints to resume from.", at_least=1)] = 1
    importance_samples: Annotated[int, Option("Samples of z for each test likelihood.", at_least=1)] = 1000
    likelihood_samples: Annotated[int, Option("Test samples whose likelihood is estimated.", at_least=1)] = 1000
    seed: Annotated[int, Option("Of weights, batches and noise.", at_least=0, below=2**32)] = 0
    num_threads: Annotated[int, Option("CPU threads; 0: as many as PyTorch takes.", at_least=0, below=4096)] = 0
    tensorboard: Annotated[bool, Option("Write TensorBoard files as well.")] = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.model != "vae" and self.warmup_epochs + self.calibration_epochs >= self.epochs:
            stages = "warm-up and calibration" if self.calibration_epochs else "warmup_epochs"
            raise ValueError(
                f"{stages}: fewer than epochs = {self.epochs} expected, "
                f"got {self.warmup_epochs + self.calibration_epochs}"
            )

        if self.learn_divergence_weight and self.model != "csrae":
            raise ValueError("learn_divergence_weight: the model 'csrae' expected")

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the lowest validation loss are kept; losses of different λ are not compared."""
        return self.validation_fraction > 0 and not self.learn_divergence_weight

    @property
    def calibration_epochs(self) -> int:
        """Epochs at λ = 2 that give ε where it is not given."""
        return max(1, self.warmup_epochs) if self.learn_divergence_weight and self.target_divergence == 0 else 0


def options(kind: type = TrainConfig) -> dict[str, Option]:
    """The option of each field of :class:`TrainConfig`, or of another dataclass of options."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items()}


def check_options(config: Any) -> None:
    """Converts the values of a dataclass of options to their types, in place, and holds them to their ranges.

    Raises:
        ValueError: a value out of range. TypeError: a value of another type.
    """
    types = get_type_hints(type(config))
    for name, option in options(type(config)).items():
        value = getattr(config, name)
        if get_origin(types[name]) is tuple:
            if not isinstance(value, list | tuple) or not value:
                raise TypeError(f"{name}: a list with something in it expected, got {value!r}")
            value = tuple(_checked(name, item, get_args(types[name])[0], option) for item in value)
        else:
            value = _checked(name, value, types[name], option)
        object.__setattr__(config, name, value)


def check_value(name: str, value: Any) -> Any:
    """A value of an option of training, converted to its type. Raises: see :func:`check_options`."""
    return _checked(name, value, get_type_hints(TrainConfig)[name], options()[name])


def _checked(name: str, value: Any, kind: type, option: Option) -> Any:
    """The value, converted if that loses nothing."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: an integer of 64 bits expected")
    if name in ("data", "output_dir") and isinstance(value, str | Path):
        value = check_path(name, str(value))
    if kind is float and type(value) is int:
        value = float(value)
    elif kind is Path and isinstance(value, str):
        value = Path(value)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name}: {kind.__name__} expected, got {value!r}")
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name}: one of {', '.join(CHOICES[name])} expected, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: a finite value expected, got {value}")
    if option.at_least > -math.inf and value < option.at_least:
        raise ValueError(f"{name}: at least {option.at_least} expected, got {value}")
    if option.above > -math.inf and value <= option.above:
        raise ValueError(f"{name}: above {option.above} expected, got {value}")
    if option.below < math.inf and value >= option.below:
        raise ValueError(f"{name}: below {option.below} expected, got {value}")
    return value


def check_path(name: str, value: str) -> str:
    """A path as Python gives those of the command line in this locale. Raises: ValueError: its bytes are no text."""
    try:
        content = os.fsencode(value)
    except UnicodeEncodeError:  # from a TOML file, in the locale C
        content = value.encode("utf-8", "surrogatepass")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: a path in UTF-8 expected, got {content!r}") from error
    if "\0" in text:
        raise ValueError(f"{name}: a path without zero bytes expected, got {text!r}")
    return os.fsdecode(content)


def parse_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. Raises: OSError: no such file. ValueError: not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The options of a training run in a TOML file.

    Raises:
        OSError: no such file.
        ValueError: not TOML, or an option that does not exist.
    """
    values = parse_toml(path)
    if unknown := sorted(values.keys() - options().keys()):
        raise ValueError(f"{path}: no option is called {', '.join(unknown)}")
    return values


def to_toml(config: TrainConfig, comments: dict[str, str]) -> str:
    """All options as TOML, below comment lines such as versions."""
    lines = [f"# {name} {value}" for name, value in comments.items()]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str | Path):  # JSON's escapes above U+FFFF are not TOML's, nor is its bare U+007F
            value = os.fsencode(value).decode("utf-8")
        lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"
