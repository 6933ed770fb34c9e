"""What the commands do with a run's directory: train, evaluate, sample, interpolate."""

from __future__ import annotations

import io
import json
import math
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
from csdiv.models.folder import (
    REPORT,
    SCORES,
    check_files_and_folders,
    check_output_dir,
    check_replaced,
    write,
    write_atomically,
)
from csdiv.models.networks import BernoulliDecoder
from csdiv.models.readers import check_memory
from csdiv.models.training import RANK, TrainResult, train


def train_and_report(config: TrainConfig, *, overwrite: bool = False, resume: bool = False) -> None:
    """Trains, fills ``config.output_dir`` and prints the scores; rank 0 evaluates.

    Raises: see :func:`csdiv.models.data.load_data` and :func:`csdiv.models.training.train`.
    """
    if RANK == 0:
        check_output_dir(config.output_dir, config.data, overwrite=overwrite, resume=resume)
    data = load_data(
        config.data, validation_fraction=config.validation_fraction, validation_split=config.validation_split
    )

    def finish(result: TrainResult) -> None:
        evaluation = evaluate(
            result.model,
            data,
            importance_samples=config.importance_samples,
            likelihood_samples=config.likelihood_samples,
            batch_size=config.batch_size,
        )
        captions = save_figures(config.output_dir, result.model, data, evaluation, result.history)
        scores = report.score_rows(evaluation, result.seconds)
        _write_scores(config.output_dir, scores)
        report.write(config, data, result.model, scores, captions)
        _print(scores)
        print(f"report: {config.output_dir / REPORT}")

    train(config, data, overwrite=overwrite, resume=resume, finish=finish)


def evaluate_run(directory: Path, **options: Any) -> None:
    """Prints the scores of a run's model and writes scores.json.

    Args:
        directory: of the run.
        options: data, importance_samples, likelihood_samples, num_threads instead of the run's own; None keeps them.
    """
    config = replace(checkpoint.load_config(directory), **{k: v for k, v in options.items() if v is not None})
    check_files_and_folders(directory, files=(SCORES,))
    check_replaced(directory, (SCORES,))
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
    """Decodes n draws from the prior of a run's model into a PNG grid or the array ``x`` of an .npz file.

    Raises:
        ValueError: n below 1 or beyond memory, or an ``output`` of another kind, or that is the data of the run.
    """
    shape = _shape(directory)
    _check_samples("n", n, n, shape, output, directory)
    model = checkpoint.load_model(directory)
    torch.manual_seed(seed)
    _save_samples(output, model.sample(n), shape, columns=12)


def interpolate_run(directory: Path, pairs: int, steps: int, output: Path, seed: int) -> None:
    """Decodes the lines between codes of random pairs of test samples, one pair a row.

    Raises:
        ValueError: fewer than 2 ``pairs`` test samples; sizes and ``output`` as for :func:`sample_run`.
    """
    config = checkpoint.load_config(directory)
    shape = _shape(directory)
    _check_samples("pairs", pairs, pairs * steps, shape, output, directory)
    _check_samples("steps", steps, pairs * steps, shape, output, directory)
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
    return tuple(checkpoint.read_model_options(directory)["sample_shape"])


def _check_samples(option: str, value: int, count: int, shape: tuple[int, ...], output: Path, directory: Path) -> None:
    """Raises a ValueError or an OSError for what could not be saved, before anything is computed."""
    if value < 1:
        raise ValueError(f"{option}: at least 1 expected, got {value}")
    check_memory(4.0 * count * math.prod(shape), f"{count} samples")
    if output.suffix != ".npz" and (output.suffix != ".png" or len(shape) != 3):
        expected = "a .png or .npz file" if len(shape) == 3 else "an .npz file, for data that are no images,"
        raise ValueError(f"output: {expected} expected, got {output}")
    check_files_and_folders(output.parent, files=(output.name,))
    data = checkpoint.load_config(directory).data if (directory / checkpoint.OPTIONS).exists() else "digits"
    if output.exists() and data != "digits" and Path(data).exists() and output.samefile(data):
        raise ValueError(f"output: {output} holds the data of the run")


def _save_samples(output: Path, x: Tensor, shape: tuple[int, ...], columns: int) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    if output.suffix == ".npz":
        np.savez(content, x=x.reshape(-1, *shape).numpy())
    else:
        save_image_grid(content, x, shape, columns)
    write_atomically(output, content.getvalue())
    print(f"{len(x)} decoded: {output}")


def _write_scores(directory: Path, scores: report.Rows) -> None:
    write(directory, SCORES, json.dumps(dict(scores), indent=2, ensure_ascii=False) + "\n")


def _print(scores: report.Rows) -> None:
    width = max(len(name) for name, _ in scores)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in scores))
