"""What a study is made of: cells, each computed once and kept as JSON, so that a study stopped anywhere goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from csdiv.models import checkpoint, folder
from csdiv.models.config import TrainConfig
from csdiv.models.data import Dataset
from csdiv.models.modules import PosteriorCollapse, TrainingDiverged
from csdiv.models.training import METRICS, Interrupted, read_metrics, train

Results = Mapping[str, dict[str, Any]]
"""What finished cells gave, by their names."""

FREE = ("data", "output_dir", "num_threads", "tensorboard", "checkpoint_interval", "importance_samples",
        "likelihood_samples")  # fmt: skip
"""Options that leave a trained model the same."""


@dataclass(frozen=True)
class Cell:
    """One step of a study.

    Attributes:
        name: of its JSON file, relative to the study's output directory, without ``.json``.
        compute: what gives the result, of numbers, names and lists of them.
        work: an estimate of the seconds that it takes on a quiet machine; only ratios matter once a cell has finished.
    """

    name: str
    compute: Callable[[], dict[str, Any]]
    work: float


def digest(*values: Any) -> str:
    """Eight hexadecimal digits that differ for different options."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


def model_name(config: TrainConfig) -> str:
    """The cell that trains this model: the same for all studies with the same options, defaults aside."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    kept = {name: value for name, value in asdict(config).items() if name not in FREE and value != defaults[name]}
    return f"models/{config.model}-seed{config.seed}-{digest(kept)}/result"


def training_cell(config: TrainConfig, data: Dataset, output_dir: Path) -> Cell:
    """Trains a model below ``output_dir``/models, from its last checkpoint if there is one.

    The result has "seconds" (of all its runs), "epochs", the last record of metrics.jsonl, and "versions"; "stopped", a
    message, where the run stopped itself: diverged, or collapsed.
    """
    name = model_name(config)
    config = replace(config, output_dir=(output_dir / name).parent)
    parameters = 2 * config.hidden_dim * (config.hidden_dim + 1.5 * config.latent_dim + data.num_features)
    steps = config.epochs * -(-len(data.train.x) // config.batch_size)
    work = steps * (4e-3 + 1e-10 * config.batch_size * parameters)  # seconds on two CPU cores, roughly

    def compute() -> dict[str, Any]:
        directory = config.output_dir
        clock, start, stopped = directory / folder.CLOCK, time.perf_counter(), ""
        before = folder.read_json(clock) if clock.exists() else 0.0
        if not isinstance(before, float):
            raise ValueError(f"{clock}: a number of seconds expected")
        resume = (directory / folder.RESUME).exists()

        def take_time() -> float:
            seconds = before + time.perf_counter() - start
            if directory.is_dir():
                folder.write_atomically(clock, json.dumps(seconds))
            return seconds

        try:
            train(config, data, resume=resume, overwrite=not resume)
        except (PosteriorCollapse, TrainingDiverged) as error:
            stopped = str(error)
        except (Interrupted, KeyboardInterrupt):
            take_time()
            raise
        seconds = take_time()
        records = read_metrics(directory / METRICS)
        result = {"seconds": seconds, "versions": checkpoint.versions(), "threads": torch.get_num_threads()}
        result |= {"options": json.loads(json.dumps(asdict(config), default=str)), **(records[-1] if records else {})}
        return result | ({"stopped": stopped} if stopped else {})

    return Cell(name, compute, work)


CellList = Callable[[Results], list[Cell]]
"""All cells of a study, given what is finished: later ones may depend on what earlier ones gave."""


def read_results(cells: CellList, output_dir: Path) -> dict[str, dict[str, Any]]:
    """What is finished, by the cells' names."""
    results: dict[str, dict[str, Any]] = {}
    while True:
        paths = {cell.name: output_dir / f"{cell.name}.json" for cell in cells(results) if cell.name not in results}
        new = {name: folder.read_json(path) for name, path in paths.items() if path.exists()}
        for name, result in new.items():
            if not isinstance(result, dict):
                raise ValueError(f"{paths[name]}: not the result of a cell")
        if not new:
            return results
        results |= new


def run_cells(cells: CellList, output_dir: Path) -> dict[str, dict[str, Any]]:
    """Computes the cells that are not finished, one after the other, and prints how far it is. Returns all results."""
    results = read_results(cells, output_dir)
    left = [cell for cell in cells(results) if cell.name not in results]
    budget = sum(cell.work for cell in left)
    print(f"{len(results)} cells are finished, {len(left)} to do: {_minutes(budget)} on two quiet cores", flush=True)
    spent = worked = 0.0
    while left:
        cell, pace = left[0], spent / worked if worked else 1.0
        place = f"[{len(results) + 1}/{len(results) + len(left)}]"
        print(f"{place} {cell.name}, {_minutes(pace * sum(cell.work for cell in left))} left", flush=True)
        start = time.perf_counter()
        result = cell.compute()
        seconds = time.perf_counter() - start
        spent, worked = spent + seconds, worked + cell.work
        path = output_dir / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.write_atomically(path, json.dumps({"seconds": seconds} | result) + "\n")
        if "stopped" in result:
            print(f"stopped: {result['stopped']}", flush=True)
        results = read_results(cells, output_dir)
        left = [cell for cell in cells(results) if cell.name not in results]
    return results


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
