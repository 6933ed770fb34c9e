"""A study's protocol: a TOML file with the options of all studies, of training and of the study itself."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from csdiv.models.config import Option, TrainConfig, check_options, options, parse_toml
from csdiv.models.data import Dataset, load_data

PROTOCOLS = Path(__file__).parent
STUDIES = ("density", "clustering", "semisupervised", "faces")
ABLATIONS: dict[str, dict[str, Any]] = {
    "random initialisation": {"initialisation": "random"},
    "no warm-up": {"warmup_epochs": 0},
    "initial variances of at least 1": {"variance_floor": 1.0},
}
"""Options of training that a study changes one at a time, by what its table says of them."""


@dataclass(frozen=True)
class StudyConfig:
    """What every study has; a subclass adds the options of one.

    Raises:
        ValueError: a value out of range, or an option of training that does not exist. TypeError: of another type.
    """

    data: Annotated[str, Option("'digits', or a folder of IDX files or images, or an .npz or .pt file.")] = "digits"
    output_dir: Annotated[Path, Option("Results; models in it are shared by studies.")] = Path("runs/studies/digits")
    seeds: Annotated[int, Option("Runs of each headline row, with seeds 0, 1, ...", at_least=1)] = 1
    train: Annotated[dict, Option("Options of csdiv train that all models share.")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self)
        if unknown := sorted(self.train.keys() - options().keys()):
            raise ValueError(f"train: no option is called {', '.join(unknown)}")

    def training(self, model: str, weight: float, num_components: int, seed: int, **given: Any) -> TrainConfig:
        """The options of one training run.

        Args:
            model: as in TrainConfig; "vae" ignores ``num_components``.
            weight: λ; a VAE gets β = λ / 2, which acts alike.
            given: other options, which win over the study's.
        """
        own = {
            "data": self.data,
            "model": model,
            "divergence_weight": weight if model == "csrae" else weight / 2.0,
            "num_components": 1 if model == "vae" else num_components,
            "seed": seed,
        }
        return TrainConfig(**{"max_variance_ratio": 0.8} | self.train | own | given)

    def load(self) -> Dataset:
        """The data, split as the training runs do."""
        shared = TrainConfig(**self.train | {"data": self.data})
        return load_data(
            shared.data, validation_fraction=shared.validation_fraction, validation_split=shared.validation_split
        )


C = TypeVar("C", bound=StudyConfig)


def read_study(kind: type[C], name: str, protocol: str, given: dict[str, Any]) -> C:
    """The options of a study.

    Args:
        kind: the study's own options.
        name: of the study, whose table in the file it is; a table ``train`` in that adds to the common one.
        protocol: of those that come with csdiv, "digits" or "mnist", or the path of a TOML file.
        given: options that win over the file's.

    Raises:
        OSError: no such file. ValueError: an option that does not exist, or of a bad value.
    """
    shipped = PROTOCOLS / f"{protocol}.toml"
    path = shipped if shipped.exists() else Path(protocol)
    content = parse_toml(path)
    tables = {table: content.pop(table, {}) for table in STUDIES}
    values = content | tables[name] | given
    values["train"] = content.get("train", {}) | tables[name].get("train", {})
    if unknown := sorted(values.keys() - {f.name for f in fields(kind)}):
        raise ValueError(f"{path}: study {name} has no option {', '.join(unknown)}")
    return kind(**values)
