"""One training run: Lightning's loop around the plain modules, and files in the output directory."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from csdiv.models import checkpoint, folder
from csdiv.models.autoencoder import Autoencoder
from csdiv.models.config import TrainConfig
from csdiv.models.data import Batches, Dataset, binarize
from csdiv.models.evaluation import VALIDATION_SEED
from csdiv.models.folder import METRICS
from csdiv.models.modules import (
    RANK,
    WORLD_SIZE,
    AutoencoderTraining,
    module_of,
)
from csdiv.models.networks import standardize_


class Interrupted(Exception):
    """The run was stopped from outside (SIGINT, SIGTERM); its last checkpoint remains."""


class RunFiles(Callback):
    """Writes each epoch to metrics.jsonl, the best or last weights, and what a run resumes from."""

    def __init__(self, directory: Path, interval: int) -> None:
        self.directory, self.interval, self.best = directory, interval, float("inf")
        self.foreign = folder.tensorboard_files(directory)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = float(state["best"])

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Drops the records of epochs that a resumed run repeats."""
        path = self.directory / METRICS
        if trainer.is_global_zero:
            records = read_metrics(path) if path.exists() else []
            kept = [json.dumps(record) + "\n" for record in records if record["epoch"] < trainer.current_epoch]
            folder.write(self.directory, METRICS, "".join(kept))

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, AutoencoderTraining)
        values = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        if module.active is not module.model:
            values.pop("effective_components", None)
        record = {"epoch": trainer.current_epoch, "step": trainer.global_step, "stage": module.stage} | values
        last = trainer.current_epoch + 1 == trainer.max_epochs
        due = last or (trainer.current_epoch + 1) % self.interval == 0
        if trainer.is_global_zero:
            with (self.directory / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            for name in sorted(folder.tensorboard_files(self.directory) - self.foreign):
                folder.record(self.directory, name)
            score = values["validation_loss"] if module.config.keeps_best else -float(trainer.current_epoch)
            if module.active is module.model and score < self.best and (due or module.config.keeps_best):
                self.best = score
                checkpoint.save_weights(self.directory, module.model)
        if due:
            trainer.save_checkpoint(self.directory / folder.RESUME)


class PlainCheckpoints(CheckpointIO):
    """Resume states that are written in full or not at all, and read without executing anything."""

    def save_checkpoint(self, checkpoint_state: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.save_resume_state(checkpoint_state, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        return checkpoint.load_resume_state(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class TrainingBar(ProgressBar):
    """One progress bar over all epochs, with the parts of the loss and the samples per second."""

    REFRESH = 0.5  # s

    def __init__(self) -> None:
        super().__init__()
        columns = TextColumn("epoch {task.fields[epoch]}"), BarColumn(16), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[terms]}"))

    def disable(self) -> None:
        """Called by Lightning in every process but the first."""
        self.bar.disable = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, AutoencoderTraining)
        samples, epochs = len(module.data.train.x), trainer.max_epochs or 0
        self.task = self.bar.add_task("", total=samples * epochs, completed=samples * trainer.current_epoch,
                                      epoch=f"{trainer.current_epoch}/{epochs}", terms="")  # fmt: skip
        self.bar.start()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.start = self.shown = time.perf_counter()
        self.samples = 0
        self.bar.update(self.task, epoch=f"{trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self.samples += len(batch) * WORLD_SIZE
        self.bar.advance(self.task, len(batch) * WORLD_SIZE)
        now = time.perf_counter()
        if now - self.shown >= self.REFRESH or batch_index == 0:
            terms = (outputs[name].mean().item() for name in ("reconstruction", "regularizer"))
            rate = self.samples / (now - self.start)
            self.bar.update(
                self.task, terms="reconstruction {:.2f}, divergence {:.2f} nats, {:.0f} samples/s".format(*terms, rate)
            )
            self.shown = now

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.bar.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.bar.stop()


@dataclass(frozen=True)
class TrainResult:
    """The model with its best or last weights, one record per epoch as in metrics.jsonl, and the training's time."""

    model: Autoencoder
    history: list[dict[str, Any]]
    seconds: float


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, one for each epoch, the last; lines that are damaged or cut off are left out."""
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("epoch")) is int and isinstance(record.get("stage"), str):
            records[record["epoch"]] = record
    return [records[epoch] for epoch in sorted(records)]


def train(
    config: TrainConfig,
    data: Dataset,
    *,
    overwrite: bool = False,
    resume: bool = False,
    finish: Callable[[TrainResult], None] | None = None,
) -> TrainResult:
    """Trains a model and writes metrics.jsonl, config.json, config.toml, model.safetensors and resume.ckpt.

    Seeds torch's global generator and sets its number of threads: the same configuration gives the same
    curve on the same machine and versions. Under ``torchrun`` each process is a rank, and rank 0 writes.

    Args:
        config: options; files go to ``config.output_dir``, which one run at a time may hold.
        data: see :func:`csdiv.models.data.load_data`.
        overwrite: replace the files of an earlier run.
        resume: go on from the last checkpoint of the run in the output directory.
        finish: called on rank 0 with the result, while the directory is still held.

    Raises:
        FileExistsError, OSError: see :func:`csdiv.models.folder.check_output_dir`.
        FolderInUse: another process holds the directory.
        FileNotFoundError, ValueError: nothing to resume from, or not a checkpoint of this model and data.
        Interrupted: SIGINT or SIGTERM.
        TrainingDiverged: a loss that is not finite; the best weights so far remain on disk.
        PosteriorCollapse: median s/v above ``config.max_variance_ratio``; weights and checkpoint remain on disk.
        ValueError: fewer training samples than components, or a model that memory has no room for.
    """
    x, directory = data.train.x, config.output_dir
    if config.model != "vae" and len(x) < config.num_components:
        raise ValueError(f"num_components: at most {len(x)}, one per sample, expected, got {config.num_components}")
    options = checkpoint.model_options(config, data)
    if config.tensorboard and not any(find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise ValueError("tensorboard: not installed: pip install 'csdiv[track]'")
    if RANK == 0:
        folder.check_output_dir(directory, config.data, overwrite=overwrite, resume=resume)
    if resume:
        _check_checkpoint(config, data)
    checkpoint.check_size(options)
    with folder.held(directory) if RANK == 0 else nullcontext():
        if RANK == 0:  # again: another run may have ended meanwhile
            folder.check_output_dir(directory, config.data, overwrite=overwrite, resume=resume, ours=True)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.manual_seed(config.seed)
        model = checkpoint.build_model(**options)
        standardize_(model.encoder, model.decoder, x)
        if RANK == 0 and not resume:
            folder.clear(directory)
            checkpoint.save_config(directory, config, data)
        result = _train(model, data, config, resume)
        if RANK == 0 and finish is not None:
            finish(result)
    return result


def _check_checkpoint(config: TrainConfig, data: Dataset) -> None:
    """Raises unless there is a checkpoint of this model and data to go on from; shapes come before memory."""
    path = config.output_dir / folder.RESUME
    state = checkpoint.load_resume_state(path)
    checkpoint.check_data(config.output_dir, config, data)
    model = checkpoint.build_without_memory(checkpoint.model_options(config, data))
    with torch.device("meta"):
        module = module_of(model, data, config)
    checkpoint.check_resume_state(path, state, module, config.epochs)


def _train(model: Autoencoder, data: Dataset, config: TrainConfig, resume: bool) -> TrainResult:
    directory, x = config.output_dir, data.train.x
    module = module_of(model, data, config)
    validation = binarize(data.validation.x, VALIDATION_SEED) if module.binary else data.validation.x
    start = time.perf_counter()
    _fit(
        module,
        Batches(x, config.batch_size, config.seed, RANK, WORLD_SIZE),
        Batches(validation, config.batch_size) if len(validation) else None,
        directory / folder.RESUME if resume else None,
    )
    seconds = time.perf_counter() - start
    if RANK > 0:
        return TrainResult(model, [], seconds)
    return TrainResult(checkpoint.load_model(directory), read_metrics(directory / METRICS), seconds)


def _fit(module: AutoencoderTraining, batches: Batches, validation: Batches | None, resume_from: Path | None) -> None:
    config = module.config
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logger: Any = False
    if config.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        logger = TensorBoardLogger(config.output_dir, name="tensorboard", version="")
    parallel: dict[str, Any] = {"devices": 1}
    if WORLD_SIZE > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        parallel = {"devices": local, "num_nodes": WORLD_SIZE // local, "use_distributed_sampler": False}
        parallel["strategy"] = DDPStrategy(process_group_backend=backend, find_unused_parameters=True)
    trainer = Trainer(
        max_epochs=config.epochs,
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[RunFiles(config.output_dir, config.checkpoint_interval), TrainingBar()],
        plugins=[PlainCheckpoints()],
        **parallel,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning's use of torch
        warnings.filterwarnings("ignore", message="You defined a `validation_step`")  # validation_fraction is 0
        try:
            trainer.fit(module, batches, validation, ckpt_path=resume_from, weights_only=True)
        except SystemExit as stop:  # how Lightning ends where a signal ends it
            raise Interrupted from stop
    if trainer.interrupted:
        raise Interrupted
