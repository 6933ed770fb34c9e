"""What the commands do with a run's directory: train, evaluate, sample, interpolate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdiv.models import checkpoint, report
from csdiv.models.autoencoder import Autoencoder
from csdiv.models.config import TrainConfig
from csdiv.models.data import Dataset, binarize, load_data
from csdiv.models.evaluation import TEST_SEED, evaluate
from csdiv.models.figures import save_figures, save_image_grid
from csdiv.models.networks import BernoulliDecoder
from csdiv.models.training import FIGURES, RANK, REPORT, SCORES, train


def train_and_report(config: TrainConfig, *, overwrite: bool = False, resume: bool = False) -> None:
    """Trains, fills ``config.output_dir`` and prints the scores; rank 0 evaluates.

    Raises: see :func:`csdiv.models.data.load_data` and :func:`csdiv.models.training.train`.
    """
    data = load_data(
        config.data, validation_fraction=config.validation_fraction, validation_split=config.validation_split
    )
    result = train(config, data, overwrite=overwrite, resume=resume)
    if RANK > 0:
        return
    evaluation = evaluate(
        result.model,
        data,
        importance_samples=config.importance_samples,
        likelihood_samples=config.likelihood_samples,
        batch_size=config.batch_size,
    )
    captions = save_figures(config.output_dir / FIGURES, result.model, data, evaluation, result.history)
    scores = report.score_rows(evaluation, result.seconds)
    _write_scores(config.output_dir, scores)
    report.write(config, data, result.model, scores, captions)
    _print(scores)
    print(f"report: {config.output_dir / REPORT}")


def evaluate_run(directory: Path, **options: Any) -> None:
    """Prints the scores of a run's model and writes scores.json.

    Args:
        directory: of the run.
        options: data, importance_samples, likelihood_samples, num_threads instead of the run's own; None keeps them.
    """
    config = replace(checkpoint.load_config(directory), **{k: v for k, v in options.items() if v is not None})
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    model, data = _load(directory, config)
    evaluation = evaluate(
        model,
        data,
        importance_samples=config.importance_samples,
        likelihood_samples=config.likelihood_samples,
        batch_size=config.batch_size,
    )
    scores = report.score_rows(evaluation)
    _write_scores(directory, scores)
    _print(scores)


def sample_run(directory: Path, n: int, output: Path, seed: int) -> None:
    """Decodes n draws from the prior of a run's model into a PNG grid or the array ``x`` of an .npz file."""
    model = checkpoint.load_model(directory)
    torch.manual_seed(seed)
    _save_samples(output, model.sample(n), _shape(directory), columns=12)


def interpolate_run(directory: Path, pairs: int, steps: int, output: Path, seed: int) -> None:
    """Decodes the lines between codes of random pairs of test samples, one pair a row.

    Raises:
        ValueError: fewer than 2 ``pairs`` test samples.
    """
    config = checkpoint.load_config(directory)
    model, data = _load(directory, config)
    x = data.test.x
    if len(x) < 2 * pairs:
        raise ValueError(f"pairs: at most {len(x) // 2} for {len(x)} test samples expected, got {pairs}")
    if isinstance(model.decoder, BernoulliDecoder):
        x = binarize(x, TEST_SEED)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    lines = model.interpolate(x[rows[:pairs]], x[rows[pairs : 2 * pairs]], steps)
    _save_samples(output, lines.flatten(0, 1), data.sample_shape, columns=steps)


def _load(directory: Path, config: TrainConfig) -> tuple[Autoencoder, Dataset]:
    model = checkpoint.load_model(directory)
    data = load_data(
        config.data, validation_fraction=config.validation_fraction, validation_split=config.validation_split
    )
    if data.sample_shape != _shape(directory):
        raise ValueError(f"data: samples of shape {_shape(directory)} expected, got {data.sample_shape}")
    return model, data


def _shape(directory: Path) -> tuple[int, ...]:
    return tuple(json.loads((directory / checkpoint.CONFIG).read_text())["model"]["sample_shape"])


def _save_samples(output: Path, x: Tensor, shape: tuple[int, ...], columns: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".npz":
        with output.open("wb") as file:
            np.savez(file, x=x.reshape(-1, *shape).numpy())
    elif output.suffix == ".png" and len(shape) == 3:
        save_image_grid(output, x, shape, columns)
    else:
        expected = "a .png or .npz file" if len(shape) == 3 else "an .npz file, for data that are no images,"
        raise ValueError(f"output: {expected} expected, got {output}")
    print(f"{len(x)} decoded: {output}")


def _write_scores(directory: Path, scores: report.Rows) -> None:
    checkpoint.write_atomically(directory / SCORES, json.dumps(dict(scores), indent=2, ensure_ascii=False) + "\n")


def _print(scores: report.Rows) -> None:
    width = max(len(name) for name, _ in scores)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in scores))
