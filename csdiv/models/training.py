"""One training run: Lightning's loop around the plain modules, and files in the output directory."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from csdiv.models import checkpoint
from csdiv.models.autoencoder import CSRAE, VAE, AutoencoderOutput
from csdiv.models.config import TrainConfig
from csdiv.models.data import ImageData, binarize
from csdiv.models.evaluation import TRAIN_SEED, VALIDATION_SEED
from csdiv.models.initialisation import initialize_from_codes_

METRICS, FIGURES, REPORT = "metrics.jsonl", "figures", "report.html"


class TrainingDiverged(ArithmeticError):
    """A loss that is not finite: the message names the step, the term and the smallest variance."""


class TensorBatches:
    """Batches of the rows of a tensor, in a new order for each pass: a loader without workers or collation.

    Args:
        rows: (n, P).
        batch_size: rows in a batch; the last may have fewer.
        generator: draws the orders; None keeps the given one.
    """

    def __init__(self, rows: Tensor, batch_size: int, generator: torch.Generator | None = None) -> None:
        self.rows, self.batch_size, self.generator = rows, batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        n = len(self.rows)
        order = torch.arange(n) if self.generator is None else torch.randperm(n, generator=self.generator)
        return (self.rows[index] for index in order.split(self.batch_size))


class CSRAETraining(LightningModule):
    """Trains a CSRAE: VAE warm-up, k-means on the codes, then the model itself.

    The warm-up is a β-VAE of the same encoder and decoder, β = ``config.warmup_weight``.
    Images are binarised anew in each step.

    Args:
        model: the CSRAE; used as it is, without Lightning, afterwards.
        train_images: (n, P) gray levels in [0, 1].
        config: options.
    """

    def __init__(self, model: CSRAE, train_images: Tensor, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.config, self.train_images = model, config, train_images
        self.warmup = VAE(model.encoder, model.decoder, config.warmup_weight)

    @property
    def stage(self) -> str:
        return "warm-up" if self.current_epoch < self.config.warmup_epochs else "csrae"

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.config.warmup_epochs:
            with torch.no_grad():
                means, log_variances = self.model.encoder(binarize(self.train_images, TRAIN_SEED).to(self.device))
            floor, seed = self.config.variance_floor, self.config.seed
            initialize_from_codes_(self.model.prior, means, log_variances.exp(), variance_floor=floor, seed=seed)

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        return self._step("train", torch.bernoulli(images))

    def validation_step(self, x: Tensor, batch_index: int) -> None:
        self._step("validation", x)

    def _step(self, split: str, x: Tensor) -> Tensor:
        output = (self.warmup if self.stage == "warm-up" else self.model)(x)
        if not output.loss.isfinite():
            raise TrainingDiverged(self._diagnosis(split, output))
        terms = {
            "loss": output.loss.detach(),
            "reconstruction": output.reconstruction.detach().mean(),
            "divergence": output.divergence.detach().mean(),
        }
        self.log_dict({f"{split}_{k}": v for k, v in terms.items()}, on_step=False, on_epoch=True, batch_size=len(x))
        return output.loss

    def _diagnosis(self, split: str, output: AutoencoderOutput) -> str:
        terms = {"reconstruction": output.reconstruction, "divergence": output.divergence}
        term = next((name for name, value in terms.items() if not value.isfinite().all()), "sum of the terms")
        code, prior = (t.min().exp().item() for t in (output.log_variances, self.model.prior.log_variances))
        return (
            f"{split} loss {output.loss.item()} at step {self.global_step} ({self.stage}): the {term} is not finite; "
            f"smallest variance of a code {code:.3g}, of the prior {prior:.3g}; a smaller learning rate may help"
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)
        steps = self.config.epochs * -(-len(self.train_images) // self.config.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RunFiles(Callback):
    """Appends each epoch to metrics.jsonl and keeps the weights of the lowest validation loss after the warm-up."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.best = directory, float("inf")

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, CSRAETraining)
        values = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        record = {"epoch": trainer.current_epoch, "step": trainer.global_step, "stage": module.stage} | values
        with (self.directory / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        if module.stage == "csrae" and values["validation_loss"] < self.best:
            self.best = values["validation_loss"]
            checkpoint.save_weights(self.directory, module.model)


class EpochBar(ProgressBar):
    """One progress bar over all epochs, with the parts of the loss."""

    def __init__(self) -> None:
        super().__init__()
        columns = TextColumn("{task.completed}/{task.total} epochs"), BarColumn(16), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[terms]}"))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.task = self.bar.add_task("", total=trainer.max_epochs, terms="")
        self.bar.start()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        values = trainer.callback_metrics
        terms = ", ".join(f"{name} {values[f'train_{name}']:.2f}" for name in ("reconstruction", "divergence"))
        self.bar.update(self.task, advance=1, terms=terms)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()


@dataclass(frozen=True)
class TrainResult:
    """The model of the lowest validation loss, one record per epoch as in metrics.jsonl, and the training's time."""

    model: CSRAE
    history: list[dict[str, Any]]
    seconds: float


def prepare_output_dir(directory: Path, overwrite: bool) -> None:
    """Creates the directory; with ``overwrite`` removes the files of an earlier run, and no others.

    Raises:
        FileExistsError: the directory is not empty and ``overwrite`` is False, or it is a file.
    """
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise FileExistsError(f"{directory} is not empty: pass --overwrite to replace its results")
    directory.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, REPORT, checkpoint.WEIGHTS, checkpoint.CONFIG):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / FIGURES, ignore_errors=True)


def train(config: TrainConfig, data: ImageData) -> TrainResult:
    """Trains a CSRAE and writes metrics.jsonl, config.json and model.safetensors to ``config.output_dir``.

    Seeds torch's global generator and sets its number of threads: the same configuration gives the same
    curve on the same machine and versions.

    Raises:
        FileExistsError: see :func:`prepare_output_dir`.
        TrainingDiverged: a loss that is not finite; the best weights so far remain on disk.
        ValueError: fewer training images than components.
    """
    images = data.train.images
    if len(images) < config.num_components:
        raise ValueError(f"num_components: at most {len(images)}, one per image, expected, got {config.num_components}")
    prepare_output_dir(config.output_dir, config.overwrite)
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    model = checkpoint.build_csrae(**checkpoint.model_options(config, images.shape[-1]))
    checkpoint.save_config(config.output_dir, config, images.shape[-1])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = Trainer(
        max_epochs=config.epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RunFiles(config.output_dir), EpochBar()],
    )
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning's use of torch
        trainer.fit(
            CSRAETraining(model, images, config),
            TensorBatches(images, config.batch_size, torch.Generator().manual_seed(config.seed)),
            TensorBatches(binarize(data.validation.images, VALIDATION_SEED), config.batch_size),
        )
    seconds = time.perf_counter() - start
    history = [json.loads(line) for line in (config.output_dir / METRICS).read_text().splitlines()]
    return TrainResult(checkpoint.load_model(config.output_dir), history, seconds)
