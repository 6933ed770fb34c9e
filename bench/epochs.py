"""One epoch of each autoencoder beside the VAE's: ``csdiv bench epochs --data FOLDER``.

The same perceptron 784-500-500-20, Bernoulli likelihood and Adam for all, through Lightning as in ``csdiv train``; the
k-means that starts a prior is left out. Models take turns, and each round gives one ratio to the VAE's time.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer

from csdiv.models.autoencoder import CSRAE
from csdiv.models.checkpoint import build_model, model_options
from csdiv.models.config import TrainConfig
from csdiv.models.data import Batches, Dataset, load_data
from csdiv.models.modules import AutoencoderTraining, CSRAETraining, VAETraining


class Variant(NamedTuple):
    """A model, its components, and the steps between computations of their self term."""

    model: str
    num_components: int
    interval: int

    def __str__(self) -> str:
        if self.model == "vae":
            return "VAE, N(0, I)"
        every = "every step" if self.interval == 1 else f"every {self.interval} steps"
        return f"CSRAE, K = {self.num_components}, self term {every}"


VARIANTS = (
    Variant("vae", 1, 1),
    Variant("csrae", 50, 1),
    Variant("csrae", 500, 1),
    Variant("csrae", 5000, 10),
    Variant("csrae", 5000, 1),
)


class EpochTime(Callback):
    """Seconds from the first step of an epoch to its end."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_index: int) -> None:
        if batch_index == 0:
            self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.seconds = time.perf_counter() - self.begin


class _WithoutKMeans(CSRAETraining):
    def _initialize_prior(self) -> None:
        k = self.model.prior.num_components
        codes = self.model.encode(self.data.train.x[torch.randperm(len(self.data.train.x))[:k]])
        assert codes.variances is not None
        self.model.prior.initialize_(codes.means, codes.variances)


def epoch_seconds(variant: Variant, data: Dataset) -> float:
    """Trains a fresh model for one epoch."""
    config = TrainConfig(
        model=variant.model,
        num_components=variant.num_components,
        self_overlap_interval=variant.interval,
        latent_dim=20,
        hidden_dim=500,
        batch_size=256,
        epochs=1,
        warmup_epochs=0,
        learning_rate=1e-3,
    )
    torch.manual_seed(0)
    model = build_model(**model_options(config, data))
    training: AutoencoderTraining = (
        _WithoutKMeans(model, data, config) if isinstance(model, CSRAE) else VAETraining(model, data, config)
    )
    clock = EpochTime()
    trainer = Trainer(
        max_epochs=1,
        enable_progress_bar=False,
        devices=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(training, Batches(data.train.x, config.batch_size, 0))
    return clock.seconds


def run(source: str, rounds: int) -> list[dict[str, object]]:
    """Median seconds of an epoch, and the median over rounds of the ratio to the VAE's."""
    data = load_data(source, validation_fraction=0.0)
    times: dict[Variant, list[float]] = {variant: [] for variant in VARIANTS}
    epoch_seconds(VARIANTS[0], data)  # the first pass over the data is slower
    for _ in range(rounds):
        for variant in VARIANTS:
            times[variant].append(epoch_seconds(variant, data))
    vae = times[VARIANTS[0]]
    return [
        {
            "model": str(variant),
            "samples": len(data.train.x),
            "median_s": statistics.median(seconds),
            "ratio_to_vae": statistics.median(own / base for own, base in zip(seconds, vae, strict=True)),
            "rounds": rounds,
        }
        for variant, seconds in times.items()
    ]


def markdown(records: list[dict[str, Any]]) -> str:
    """The records as a table."""
    lines = ["| model | seconds per epoch | times the VAE's |", "|---|---|---|"]
    lines += [f"| {r['model']} | {r['median_s']:.2f} | {r['ratio_to_vae']:.2f} |" for r in records]
    return "\n".join(lines)
