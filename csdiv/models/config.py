"""The options of a training run, stated once: the command's flags and help are made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints


class Option(NamedTuple):
    """What an option means, and the values it takes: ≥ at_least, > above."""

    help: str
    at_least: float = -math.inf
    above: float = -math.inf


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run; each is a flag of ``csdiv train``.

    Raises:
        ValueError: a value out of range.
    """

    output_dir: Annotated[Path, Option("Directory of all results.")] = Path("runs/digits")
    overwrite: Annotated[bool, Option("Replace the results of an earlier run in the output directory.")] = False
    num_components: Annotated[int, Option("K, components of the prior.", at_least=1)] = 50
    latent_dim: Annotated[int, Option("D, dimensions of the codes.", at_least=1)] = 10
    hidden_dim: Annotated[int, Option("Width of both hidden layers of encoder and decoder.", at_least=1)] = 256
    epochs: Annotated[int, Option("Passes over the training images, warm-up included.", at_least=1)] = 200
    warmup_epochs: Annotated[int, Option("Epochs as a VAE, before k-means on the codes.", at_least=0)] = 20
    batch_size: Annotated[int, Option("Images in one step.", at_least=1)] = 128
    learning_rate: Annotated[float, Option("Peak rate of Adam under a one-cycle schedule.", above=0)] = 3e-3
    divergence_weight: Annotated[float, Option("λ; 2 acts like the KL term of a VAE.", at_least=0)] = 1.0
    warmup_weight: Annotated[float, Option("β, weight of the warm-up's KL term.", at_least=0)] = 0.1
    variance_floor: Annotated[float, Option("Smallest component variance that k-means gives.", above=0)] = 1e-3
    importance_samples: Annotated[int, Option("Samples per image for the test likelihood.", at_least=1)] = 1000
    seed: Annotated[int, Option("Of weights, batches and noise.", at_least=0)] = 0
    num_threads: Annotated[int, Option("CPU threads; networks of this size gain nothing from more.", at_least=1)] = 1

    def __post_init__(self) -> None:
        for name, option in options().items():
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: a finite value expected, got {value}")
            if option.at_least > -math.inf and value < option.at_least:
                raise ValueError(f"{name}: at least {option.at_least} expected, got {value}")
            if option.above > -math.inf and value <= option.above:
                raise ValueError(f"{name}: above {option.above} expected, got {value}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: below epochs = {self.epochs} expected, got {self.warmup_epochs}")


def options() -> dict[str, Option]:
    """The option of each field of :class:`TrainConfig`."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}
