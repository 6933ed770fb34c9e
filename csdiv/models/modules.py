"""What Lightning trains: an autoencoder, its warm-up and its prior's beginning, and the checks that stop a run."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from csdiv import GaussianMixture
from csdiv.models import checkpoint, folder
from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder, AutoencoderOutput, VampPriorVAE
from csdiv.models.config import TrainConfig
from csdiv.models.data import Batches, Dataset, binarize, mix_seed
from csdiv.models.evaluation import TRAIN_SEED, active_units, effective_number, variance_ratio
from csdiv.models.initialisation import initialize_from_codes_
from csdiv.models.multiplier import ConstraintMultiplier, least_divergence
from csdiv.models.networks import BernoulliDecoder
from csdiv.nn import GaussianMixturePrior

_LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ
RANK, WORLD_SIZE = (int(os.environ[name]) if _LAUNCHED else alone for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))


class TrainingDiverged(ArithmeticError):
    """A loss that is not finite: the message names the step, the term and the smallest variance."""


class PosteriorCollapse(ArithmeticError):
    """Codes as wide as their components: they say little beyond the component. The state of the run is kept."""


class AutoencoderTraining(LightningModule):
    """Trains an autoencoder; images of a Bernoulli likelihood are binarised anew in each step.

    Every epoch draws from a seed of its own, so that a resumed run continues the same curve.

    Args:
        model: used as it is, without Lightning, afterwards.
        data: its training split is trained on.
        config: options.
    """

    stage = "vae"

    def __init__(self, model: Autoencoder, data: Dataset, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.data, self.config = model, data, config
        self.binary = isinstance(model.decoder, BernoulliDecoder)
        self._validation_codes: list[tuple[Tensor, Tensor]] = []

    @property
    def active(self) -> Autoencoder:
        """What is trained in this epoch."""
        return self.model

    def on_train_epoch_start(self) -> None:
        batches = self.trainer.train_dataloader
        assert isinstance(batches, Batches)
        batches.set_epoch(self.current_epoch)
        torch.manual_seed(mix_seed(self.config.seed, self.current_epoch, RANK))

    def training_step(self, x: Tensor, batch_index: int) -> dict[str, Tensor]:
        output = self._step("train", torch.bernoulli(x) if self.binary else x)
        return {"loss": output.loss} | {
            name: getattr(output, name).detach() for name in ("reconstruction", "regularizer")
        }

    def validation_step(self, x: Tensor, batch_index: int) -> None:
        output = self._step("validation", x)
        self._validation_codes.append((output.means, output.log_variances))

    def on_validation_epoch_end(self) -> None:
        means, log_variances = (torch.cat(side) for side in zip(*self._validation_codes, strict=True))
        self._validation_codes.clear()
        self.log("active_units", float(active_units(means)), sync_dist=WORLD_SIZE > 1)
        self.log("divergence_weight", self.active.divergence_weight, sync_dist=WORLD_SIZE > 1)
        if self.active is self.model and self.model.prior_mixture().num_components > 1:
            prior = self.model.prior_mixture().detach()
            self.log("effective_components", effective_number(prior.assign(means)), sync_dist=WORLD_SIZE > 1)
            ratio = variance_ratio(GaussianMixture(means, log_variances.exp()), prior)
            self.log("variance_ratio", ratio, sync_dist=WORLD_SIZE > 1)

    def _step(self, split: str, x: Tensor) -> AutoencoderOutput:
        output = self.active(x)
        if not output.loss.isfinite():
            raise TrainingDiverged(self._diagnosis(split, output))
        terms = {
            "loss": output.loss.detach(),
            "reconstruction": output.reconstruction.detach().mean(),
            "divergence": output.regularizer.detach().mean(),
        }
        self.log_dict(
            {f"{split}_{name}": value for name, value in terms.items()},
            on_step=False,
            on_epoch=True,
            batch_size=len(x),
            sync_dist=WORLD_SIZE > 1,
        )
        return output

    def _diagnosis(self, split: str, output: AutoencoderOutput) -> str:
        terms = {"reconstruction": output.reconstruction, "divergence": output.regularizer}
        term = next((name for name, value in terms.items() if not value.isfinite().all()), "sum of the terms")
        variances = {"a code": output.log_variances.exp()}
        prior = self.active.prior_mixture()
        if prior.num_components > 1 and prior.variances is not None:
            variances["the prior"] = prior.variances
        smallest = ", ".join(f"of {name} {value.min().item():.3g}" for name, value in variances.items())
        return (
            f"{split} loss {output.loss.item()} at step {self.global_step} ({self.stage}): the {term} is not finite; "
            f"smallest variance {smallest}; a smaller learning rate may help"
        )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.config.learning_rate)
        batches = Batches(self.data.train.x, self.config.batch_size, rank=RANK, world_size=WORLD_SIZE)
        steps = self.config.epochs * len(batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.config.learning_rate, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, state: dict[str, Any]) -> None:
        checkpoint.check_resume_state(folder.RESUME, state, self, self.config.epochs)


class VAETraining(AutoencoderTraining):
    """Trains a VAE."""


class MixtureTraining(AutoencoderTraining):
    """Trains a model with a mixture prior: VAE warm-up, k-means on the codes, then the model itself.

    The warm-up is a β-VAE of the same encoder and decoder, β = ``config.warmup_weight``. Pseudo-inputs begin as
    training samples.
    """

    def __init__(self, model: Autoencoder, data: Dataset, config: TrainConfig) -> None:
        super().__init__(model, data, config)
        self.warmup = VAE(model.encoder, model.decoder, config.warmup_weight)

    @property
    def stage(self) -> str:  # type: ignore[override]
        return "warm-up" if self.current_epoch < self.config.warmup_epochs else self.config.model

    @property
    def active(self) -> Autoencoder:
        return self.warmup if self.stage == "warm-up" else self.model

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.current_epoch == self.config.warmup_epochs and self.config.initialisation == "kmeans":
            self._initialize_prior()

    @torch.no_grad()
    def _initialize_prior(self) -> None:
        x = self.data.train.x
        if isinstance(self.model, VampPriorVAE):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.config.seed))
            self.model.pseudo_inputs.copy_(x[order[: len(self.model.pseudo_inputs)]])
            return
        prior = self.model.prior
        assert isinstance(prior, GaussianMixturePrior)
        codes = self.model.encode((binarize(x, TRAIN_SEED) if self.binary else x).to(self.device))
        assert codes.variances is not None
        initialize_from_codes_(
            prior, codes.means, codes.variances, variance_floor=self.config.variance_floor, seed=self.config.seed
        )
        if WORLD_SIZE > 1:
            for parameter in prior.parameters():
                torch.distributed.broadcast(parameter.data, 0)


class CSRAETraining(MixtureTraining):
    """Trains a CSRAE. A learned λ starts at 2, where the D_CS that is reached gives ε if none is given."""

    model: CSRAE

    def __init__(self, model: CSRAE, data: Dataset, config: TrainConfig) -> None:
        super().__init__(model, data, config)
        self.multiplier: ConstraintMultiplier | None = None
        if config.learn_divergence_weight:
            self.multiplier = ConstraintMultiplier(
                min(2.0, config.max_divergence_weight),
                config.target_divergence or None,
                max_weight=config.max_divergence_weight,
            )
            model.divergence_weight.copy_(self.multiplier.weight)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.model.refresh_self_overlap()
        begin = self.config.warmup_epochs
        if self.multiplier is not None and self.current_epoch == begin + self.config.calibration_epochs:
            if self.config.calibration_epochs:
                self.multiplier.set_target_()
            self._warn_of_infeasible_target()

    def _warn_of_infeasible_target(self) -> None:
        assert self.multiplier is not None
        target, least = self.multiplier.target.item(), least_divergence(self.model.prior())
        if target < least:
            warnings.warn(
                f"target_divergence: ε = {target:.3g} nats is below the {least:.3g} that codes of separated components "
                f"reach at best; λ may rise to its cap, {self.config.max_divergence_weight:g}",
                stacklevel=2,
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        if self.multiplier is not None and self.stage == "csrae":
            mean = self.trainer.strategy.reduce(outputs["regularizer"].mean(), reduce_op="mean")
            self.model.divergence_weight.copy_(self.multiplier.update_(mean))

    def on_train_epoch_end(self) -> None:
        """Stops a run whose codes are as wide as their components; Lightning calls this after its callbacks'."""
        ratio, most = float(self.trainer.callback_metrics.get("variance_ratio", 0.0)), self.config.max_variance_ratio
        settled = self.stage == "csrae" and 2 * (self.current_epoch + 1) >= self.config.epochs
        if settled and ratio > most > 0:
            raise PosteriorCollapse(
                f"posterior collapse after epoch {self.current_epoch + 1}: the median of s/v, of a code's variance to "
                f"its component's, is {ratio:.2f}, above max_variance_ratio = {most:g}; a smaller divergence_weight "
                f"than {self.model.divergence_weight.item():.3g} or more components may help; weights and checkpoint "
                "are kept"
            )

    def on_train_end(self) -> None:
        if self.multiplier is not None and self.multiplier.at_cap:
            warnings.warn(
                f"λ reached its cap, {self.multiplier.max_weight:g}, with a mean D_CS of {self.multiplier.average:.3g} "
                f"nats: ε = {self.multiplier.target:.3g} is infeasible for this model",
                stacklevel=2,
            )


def module_of(model: Autoencoder, data: Dataset, config: TrainConfig) -> AutoencoderTraining:
    """How a model is trained."""
    if isinstance(model, VAE):
        return VAETraining(model, data, config)
    return CSRAETraining(model, data, config) if isinstance(model, CSRAE) else MixtureTraining(model, data, config)
