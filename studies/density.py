"""Density estimation: importance-sampled likelihoods of autoencoders that differ in prior and divergence only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from csdiv.models.checkpoint import load_model
from csdiv.models.config import Option, TrainConfig
from csdiv.models.data import Dataset, binarize
from csdiv.models.evaluation import TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from csdiv.models.figures import STYLE, draw_images
from csdiv.models.likelihood import LogDensity, importance_sampled_nlls, refitted_prior, squared_prior
from csdiv.models.networks import BernoulliDecoder
from csdiv.studies.cells import Cell, Results, digest, model_name, training_cell
from csdiv.studies.config import ABLATIONS, StudyConfig
from csdiv.studies.report import StudyReport, Table, Value

NAMES = {
    "vae": "VAE, N(0, I)",
    "mixture_vae": "VAE, mixture prior",
    "vampprior": "VAE, VampPrior",
    "csrae": "CSRAE",
}
PRIORS = {"own": "own prior", "squared": "p²/V(p, p)", "refitted": "refitted mixture"}
SECONDS_PER_SAMPLE = 3e-11  # and parameter of the decoder, measured on two CPU cores


@dataclass(frozen=True)
class DensityConfig(StudyConfig):
    """Options of the study, the table [density] of a protocol."""

    weights: Annotated[tuple[float, ...], Option("λ to choose from; VAEs get β = λ / 2.", above=0)] = (0.6, 1.0, 2.0)
    components: Annotated[tuple[int, ...], Option("K to choose from, at the chosen λ.", at_least=1)] = (50, 1, 500)
    selection_epochs: Annotated[int, Option("Epochs of the runs that λ and K are chosen by.", at_least=1)] = 5
    final_images: Annotated[int, Option("Test images of the headline rows.", at_least=2)] = 1000
    final_samples: Annotated[int, Option("Importance samples of the headline rows.", at_least=10)] = 5000
    ablation_images: Annotated[int, Option("Images of selection and ablations.", at_least=2)] = 300
    ablation_samples: Annotated[int, Option("Importance samples of selection and ablations.", at_least=10)] = 1000
    refit_components: Annotated[int, Option("K of the mixture refitted to codes.", at_least=1)] = 50


class Candidate(NamedTuple):
    """One setting of a model: λ (β = λ / 2 for VAEs) and K, None for N(0, I)."""

    model: str
    weight: float
    num_components: int | None

    @property
    def shown_weight(self) -> str:
        return f"λ = {self.weight:g}" if self.model == "csrae" else f"β = {self.weight / 2:g}"


class DensityStudy:
    """The cells of the study, in order, and the report made of their results.

    λ is chosen at the first K of ``components``, then K at that λ: by the likelihood of validation samples, after
    ``selection_epochs``, with seed 0. The chosen settings are then trained in full with every seed.
    """

    def __init__(self, config: DensityConfig, data: Dataset) -> None:
        self.config, self.data = config, data

    # settings

    def candidates(self, model: str, results: Results) -> list[Candidate]:
        """All settings of a model; those with another than the first K have the λ that is the best so far."""
        if model == "vae":
            return [Candidate(model, weight, None) for weight in self.config.weights]
        first, *others = self.config.components
        found = [Candidate(model, weight, first) for weight in self.config.weights]
        best = self._best(found, results)
        return found + [Candidate(model, best.weight, k) for k in others if k <= len(self.data.train.x)]

    def chosen(self, model: str, results: Results) -> Candidate:
        """The setting of lowest validation NLL, so far."""
        return self._best(self.candidates(model, results), results)

    def _best(self, candidates: list[Candidate], results: Results) -> Candidate:
        return min(candidates, key=lambda c: self.selection_nll(c, results))

    def selection_nll(self, candidate: Candidate, results: Results) -> float:
        """Mean validation NLL, nats; +inf while there is none."""
        found = results.get(self._selection(candidate)[1].name, {})
        return float(np.mean(found["own"]["nll"])) if "own" in found else float("inf")

    # cells

    def cells(self, results: Results) -> list[Cell]:
        """Selection first, then the headline rows seed by seed, then the ablations."""
        found: list[Cell] = []
        for model in NAMES:
            for candidate in self.candidates(model, results):
                found += self._selection(candidate)
        for seed in range(self.config.seeds):
            for model in NAMES:
                found += self._headline(self.chosen(model, results), seed)
        for _, pair in self._ablations(results):
            found += pair
        stopped = {name for name, result in results.items() if "stopped" in result}
        kept = [cell for i, cell in enumerate(found) if not (i % 2 and found[i - 1].name in stopped)]
        return list({cell.name: cell for cell in kept}.values())

    def _selection(self, candidate: Candidate) -> tuple[Cell, Cell]:
        """Training, and its score."""
        epochs = self.config.selection_epochs
        return self._pair(candidate, 0, "validation", ("own",), epochs=epochs)

    def _headline(self, candidate: Candidate, seed: int) -> tuple[Cell, Cell]:
        return self._pair(candidate, seed, "final", tuple(PRIORS))

    def _ablations(self, results: Results) -> Iterator[tuple[str, tuple[Cell, Cell]]]:
        best = self.chosen("csrae", results)
        yield "as chosen", self._pair(best, 0, "ablation", tuple(PRIORS))
        for name, options in (ABLATIONS | {"λ as a multiplier": {"learn_divergence_weight": True}}).items():
            yield name, self._pair(best, 0, "ablation", tuple(PRIORS), **options)

    def _pair(
        self, c: Candidate, seed: int, protocol: str, priors: tuple[str, ...], **options: Any
    ) -> tuple[Cell, Cell]:
        config = self.config.training(c.model, c.weight, c.num_components or 1, seed, **options)
        training = training_cell(config, self.data, self.config.output_dir)
        return training, self._likelihood_cell(config, protocol, priors)

    def _likelihood_cell(self, config: TrainConfig, protocol: str, priors: tuple[str, ...]) -> Cell:
        final = protocol == "final"
        images = self.config.final_images if final else self.config.ablation_images
        samples = self.config.final_samples if final else self.config.ablation_samples
        model = model_name(config)
        split = self.data.validation if protocol == "validation" else self.data.test
        images = min(images, len(split.x))
        options = [protocol, images, samples, priors, self.config.refit_components]
        decoder = config.hidden_dim * (config.hidden_dim + config.latent_dim + self.data.num_features)
        work = images * (2e-3 + SECONDS_PER_SAMPLE * decoder * samples) + (10.0 if "refitted" in priors else 0.0)
        directory = (self.config.output_dir / model).parent

        def compute() -> dict[str, Any]:
            return likelihoods(directory, self.data, protocol, priors, images, samples, self.config.refit_components)

        return Cell(f"density/{directory.name}-{digest(*options)}", compute, work)

    # report

    def report(self, results: Results, figures: Path) -> StudyReport:
        """Of what is finished."""
        rows = {}
        for model in NAMES:
            best = self.chosen(model, results)
            names = [self._headline(best, seed) for seed in range(self.config.seeds)]
            done = [(t.name, s.name) for t, s in names if s.name in results]
            rows[model] = (best, [results[t] for t, _ in done if t in results], [results[s] for _, s in done])
        protocol = (
            f"{self.data.name}: {len(self.data.train.x)} training, {len(self.data.validation.x)} validation and "
            f"{len(self.data.test.x)} test samples; pixels are binarised anew in each training step, once with a fixed "
            f"seed for validation and test. λ, then K, were chosen by the NLL of {self.config.ablation_images} "
            f"validation samples x {self.config.ablation_samples} importance samples after "
            f"{self.config.selection_epochs} epochs with seed 0, never by test samples. Importance samples come from "
            "0.5 N(m, s) + 0.3 N(m, 2s) + 0.2 N(m, 4s), N(m, s) being the encoder's code; an NLL is an upper bound in "
            "expectation, close where the effective sample size is large and a tenth of the samples gives the same."
        )
        tables = [self._headline_table(rows), self._difference_table(rows), self._selection_table(results)]
        tables.append(self._ablation_table(results))
        drawn = self._figures(rows, figures)
        return StudyReport(f"Density estimation on {self.data.name}", [protocol, *self._verdicts(rows)], tables, drawn)

    def _headline_table(self, rows: dict[str, Any]) -> Table:
        table: list[list[Value]] = []
        for model, (best, trainings, scores) in rows.items():
            row: list[Value] = [NAMES[model], best.shown_weight, best.num_components, len(scores)]
            if scores:
                own = [float(np.mean(s["own"]["nll"])) for s in scores]
                row += [float(np.mean(own)), float(np.std(own, ddof=1)) if len(own) > 1 else None]
                row += [_mean(scores, "own", "tenth"), _median(scores, "own")]
                row += [_mean(scores, "squared", "nll"), _mean(scores, "refitted", "nll"), _median(scores, "refitted")]
                row.append(float(np.mean([t["seconds"] for t in trainings])) if trainings else None)
            table.append(row + [None] * (12 - len(row)))
        columns = ("model", "weight", "K", "seeds", "NLL, own prior (nats)", "sd over seeds (nats)",
                   "NLL, own prior, a tenth of the samples (nats)", "median effective sample size, own prior",
                   "NLL, p²/V(p, p) (nats)", f"NLL, mixture of {self.config.refit_components} refitted (nats)",
                   "median effective sample size, refitted", "training (s)")  # fmt: skip
        title = f"Test NLL of {self.config.final_images} samples x {self.config.final_samples} importance samples"
        return Table("headline", title, columns, table, "Means over seeds.")

    def _difference_table(self, rows: dict[str, Any]) -> Table:
        table: list[list[Value]] = []
        for other in ("vae", "mixture_vae", "vampprior"):
            for prior in PRIORS:
                if found := _paired(rows["csrae"][2], rows[other][2], prior):
                    table.append([f"CSRAE − {NAMES[other]}", PRIORS[prior], *found])
        columns = ("difference of NLL", "prior", "mean (nats)", "standard error over images (nats)",
                   "lowest of a seed (nats)", "highest of a seed (nats)")  # fmt: skip
        note = "Of the same images, averaged over the seeds that both have; negative: CSRAE is better."
        return Table("differences", "Paired differences", columns, table, note)

    def _selection_table(self, results: Results) -> Table:
        table: list[list[Value]] = []
        for model in NAMES:
            for c in self.candidates(model, results):
                training, score = (cell.name for cell in self._selection(c))
                state = "chosen" if c == self.chosen(model, results) else results.get(training, {}).get("stopped", "")
                nll = self.selection_nll(c, results)
                size = _median([results[score]], "own") if score in results else None
                shown = float(nll) if np.isfinite(nll) else None
                table.append([NAMES[model], c.shown_weight, c.num_components, shown, size, state])
        columns = ("model", "weight", "K", "validation NLL (nats)", "median effective sample size", "")
        return Table("selection", f"Selection, after {self.config.selection_epochs} epochs, seed 0", columns, table)

    def _ablation_table(self, results: Results) -> Table:
        table: list[list[Value]] = []
        for name, (training, score) in self._ablations(results):
            if found := results.get(score.name):
                last = results.get(training.name, {})
                table.append([f"CSRAE, {name}", *(_mean([found], prior, "nll") for prior in PRIORS),
                              _median([found], "own"), last.get("divergence_weight"),
                              last.get("effective_components"), last.get("variance_ratio")])  # fmt: skip
            elif stopped := results.get(training.name, {}).get("stopped"):
                table.append([f"CSRAE, {name}: {stopped}", *[None] * 7])
        columns = ("model", *(f"NLL, {name} (nats)" for name in PRIORS.values()), "median effective sample size",
                   "λ at the end", "effective components", "median s/v")  # fmt: skip
        title = f"Ablations: test NLL of {self.config.ablation_images} samples x {self.config.ablation_samples}, seed 0"
        return Table("ablations", title, columns, table)

    def _verdicts(self, rows: dict[str, Any]) -> list[str]:
        found = []
        for other in ("vae", "mixture_vae"):
            if paired := _paired(rows["csrae"][2], rows[other][2], "own"):
                mean, error = paired[0], paired[1]
                side = "below" if mean < 0 else "above"
                found.append(
                    f"Under its own prior, CSRAE is {abs(mean):.2f} ± {error:.2f} nats {side} the {NAMES[other]} "
                    f"(mean over {min(len(rows['csrae'][2]), len(rows[other][2]))} seeds, standard error over images)."
                )
        return found

    def _figures(self, rows: dict[str, Any], directory: Path) -> dict[str, str]:
        directory.mkdir(parents=True, exist_ok=True)
        captions = {}
        done = {model: row for model, row in rows.items() if row[2]}
        if not done:
            return {}
        with rc_context(STYLE):
            figure = Figure((8, 3), layout="constrained")
            ax = figure.subplots()
            for offset, (prior, label) in zip((-0.15, 0.0, 0.15), PRIORS.items(), strict=True):
                for i, (_, _, scores) in enumerate(done.values()):
                    values = [float(np.mean(s[prior]["nll"])) for s in scores]
                    ax.plot([i + offset] * len(values), values, "os^"[list(PRIORS).index(prior)],
                            color=f"C{list(PRIORS).index(prior)}", label=label if i == 0 else None)  # fmt: skip
            names = [f"{NAMES[m]}\n{b.shown_weight}" + (f", K = {b.num_components}" if b.num_components else "")
                     for m, (b, _, _) in done.items()]  # fmt: skip
            ax.set_xticks(range(len(done)), names)
            ax.set_ylabel("test NLL (nats per image)")
            ax.legend(frameon=False)
            figure.savefig(directory / "nll.png", dpi=150)
            captions["nll.png"] = "Test NLL under three priors; one mark for each seed."
            if self.data.is_image:
                figure = Figure((8, 1.6 * len(done)), layout="constrained")
                for ax, (model, (best, _, _)) in zip(
                    np.atleast_1d(figure.subplots(len(done))), done.items(), strict=True
                ):
                    trained = self._headline(best, 0)[0].name
                    autoencoder = load_model((self.config.output_dir / trained).parent)
                    with torch.random.fork_rng():
                        torch.manual_seed(0)
                        draw_images(ax, autoencoder.sample(40), self.data.sample_shape, 20)
                    ax.set_title(f"{NAMES[model]}, {best.shown_weight}", loc="left")
                figure.savefig(directory / "samples.png", dpi=150)
                captions["samples.png"] = "Decoded draws from each model's own prior, seed 0: means of the likelihood."
        return captions


def likelihoods(
    directory: Path, data: Dataset, protocol: str, priors: tuple[str, ...], images: int, samples: int, refit: int
) -> dict[str, Any]:
    """NLL, effective sample sizes and NLL at a tenth of the samples, per image, under each prior, of a trained model.

    Args:
        directory: of its run. protocol: "validation", or of the test split. refit: components of a refitted prior.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(directory).to(device)
    binary = isinstance(model.decoder, BernoulliDecoder)

    def split(x: Tensor, seed: int) -> Tensor:
        return (binarize(x, seed) if binary else x).to(device)

    validation = protocol == "validation"
    x = data.validation.x if validation else data.test.x
    x = split(x, VALIDATION_SEED if validation else TEST_SEED)[:images]
    prior = model.prior_mixture().detach()
    densities: dict[str, LogDensity] = {"own": prior.log_prob}
    if "squared" in priors:
        densities["squared"] = squared_prior(prior)
    if "refitted" in priors:
        codes = model.encode(split(data.train.x, TRAIN_SEED))
        densities["refitted"] = refitted_prior(codes, min(refit, len(codes.means))).log_prob
    with torch.random.fork_rng():
        torch.manual_seed(TEST_SEED)
        found = importance_sampled_nlls(model, x, densities, samples)
    return {
        name: {"nll": _rounded(f.nll), "tenth": _rounded(f.nll_tenth), "ess": _rounded(f.effective_sample_size)}
        for name, f in found.items()
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _mean(scores: list[dict[str, Any]], prior: str, what: str) -> float:
    return float(np.mean([np.mean(s[prior][what]) for s in scores]))


def _median(scores: list[dict[str, Any]], prior: str) -> float:
    return float(np.mean([np.median(s[prior]["ess"]) for s in scores]))


def _paired(ours: list[dict[str, Any]], others: list[dict[str, Any]], prior: str) -> list[float]:
    """Mean, standard error over images, lowest and highest of the seeds' means; empty without a common seed."""
    pairs = [np.subtract(a[prior]["nll"], b[prior]["nll"]) for a, b in zip(ours, others, strict=False)]
    if not pairs:
        return []
    per_image, per_seed = np.mean(pairs, axis=0), np.mean(pairs, axis=1)
    error = np.std(per_image, ddof=1) / np.sqrt(len(per_image))
    return [float(v) for v in (per_image.mean(), error, per_seed.min(), per_seed.max())]
