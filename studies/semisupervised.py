"""Semi-supervised learning: few labels, all images; CSRAE with components of classes, beside what labels alone give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from csdiv.models.autoencoder import CSRAE
from csdiv.models.checkpoint import load_model
from csdiv.models.classification import (
    balanced_rows,
    error_percent,
    finetune,
    predict,
    supervised_network,
    svm_error_percent,
)
from csdiv.models.config import Option
from csdiv.models.data import Dataset
from csdiv.models.figures import STYLE
from csdiv.studies.cells import Cell, Results, digest, model_name, training_cell
from csdiv.studies.config import StudyConfig
from csdiv.studies.report import StudyReport, Table, Value

CSRAE_ROW = "CSRAE, cross-entropy on class components"
DROPOUT_ROW = "supervised network, dropout"
BASELINES = {
    "network": "supervised network",
    "dropout": DROPOUT_ROW,
    "dropout_drawn": "supervised network, dropout, pixels drawn anew",
    "svm_pixels": "SVM on pixels",
    "svm_vae": "SVM on VAE codes (M1)",
    "svm_csrae": "SVM on CSRAE codes",
}


@dataclass(frozen=True)
class SemisupervisedConfig(StudyConfig):
    """Options of the study, the table [semisupervised] of a protocol."""

    labels: Annotated[tuple[int, ...], Option("Labelled samples, as many of each class.", at_least=2)] = (
        100,
        1000,
        3000,
    )
    first_draws: Annotated[int, Option("Draws of the smallest set; the others have one a seed.", at_least=1)] = 5
    weight: Annotated[float, Option("λ of the models trained without labels; a VAE gets β = λ / 2.", above=0)] = 1.0
    gammas: Annotated[tuple[float, ...], Option("γ to choose from, of the cross-entropy.", above=0)] = (10.0, 100.0)
    components: Annotated[int, Option("K of the CSRAE trained without labels.", at_least=1)] = 50
    components_per_class: Annotated[int, Option("At most, of the labelled CSRAE.", at_least=1)] = 5
    finetune_epochs: Annotated[int, Option("Passes over all samples with labels.", at_least=1)] = 5
    supervised_steps: Annotated[int, Option("Steps of the supervised networks.", at_least=1)] = 1000
    validation_labels: Annotated[int, Option("Validation samples that γ and the SVMs' C see.", at_least=1)] = 2000


class SemisupervisedStudy:
    """The cells of the study, in order, and the report made of their results.

    One CSRAE and one VAE for each seed are trained without labels; each set of labels then trains a copy of the CSRAE
    on, and the baselines. γ is chosen for each number of labels with its first draw, by validation labels.
    """

    def __init__(self, config: SemisupervisedConfig, data: Dataset) -> None:
        if data.train.labels is None or not len(data.validation.x):
            raise ValueError("data: labels and validation samples expected")
        self.config, self.data = config, data

    def draws(self, num_labels: int) -> int:
        few = num_labels == min(self.config.labels)
        return max(self.config.seeds, self.config.first_draws) if few else self.config.seeds

    def models(self, draw: int) -> tuple[Any, Any]:
        """The options of the CSRAE and the VAE that a draw starts from."""
        c, seed = self.config, draw % self.config.seeds
        return c.training("csrae", c.weight, c.components, seed), c.training("vae", c.weight, 1, seed)

    def cells(self, results: Results) -> list[Cell]:
        """Models without labels, γ, then all draws."""
        found = []
        for seed in range(self.config.seeds):
            found += [training_cell(options, self.data, self.config.output_dir) for options in self.models(seed)]
        stopped = {name for name, result in results.items() if "stopped" in result}
        own: list[tuple[int, Cell]] = []
        for n in self.config.labels:
            own += [(0, self.labelled_cell(n, 0, gamma)) for gamma in self.config.gammas]
        for n in self.config.labels:
            for draw in range(self.draws(n)):
                own += [
                    (draw, self.labelled_cell(n, draw, self.gamma(n, results))),
                    (draw, self.baseline_cell(n, draw)),
                ]
        kept = [cell for draw, cell in own if not any(model_name(m) in stopped for m in self.models(draw))]
        return found + list({cell.name: cell for cell in kept}.values())

    def gamma(self, num_labels: int, results: Results) -> float:
        """γ of the lowest validation error with the first draw, so far."""

        def error(gamma: float) -> float:
            return results.get(self.labelled_cell(num_labels, 0, gamma).name, {}).get("validation_error", 101.0)

        return min(self.config.gammas, key=error)

    def labelled_cell(self, num_labels: int, draw: int, gamma: float) -> Cell:
        """Trains a copy of the draw's CSRAE with labels: its validation and test errors, %."""
        c, options = self.config, self.models(draw)[0]
        directory = (c.output_dir / model_name(options)).parent
        kind = digest(model_name(options), c.components_per_class, c.finetune_epochs, c.validation_labels)

        def compute() -> dict[str, Any]:
            x, picked, labels = self._training(num_labels, draw)
            model = load_model(directory)
            assert isinstance(model, CSRAE)
            classes = self.data.num_classes
            model = finetune(
                model.to(x.device), x, x[picked], labels, classes, weight=gamma,
                components_per_class=c.components_per_class, epochs=c.finetune_epochs, batch_size=options.batch_size,
                learning_rate=options.learning_rate, seed=draw,
            )  # fmt: skip
            errors = {}
            for name, (some, truth) in (("validation", self._validation()), ("test", self._test())):
                errors[f"{name}_error"] = error_percent(predict(model, some.to(x.device), classes), truth)
            return errors | {"components": model.prior.num_components}

        parameters = 2 * options.hidden_dim * (options.hidden_dim + 1.5 * options.latent_dim + self.data.num_features)
        steps = c.finetune_epochs * -(-len(self.data.train.x) // options.batch_size)
        work = steps * (5e-3 + 1.4e-10 * options.batch_size * parameters)
        return Cell(f"semisupervised/csrae-{num_labels}-{draw}-{gamma:g}-{kind}", compute, work)

    def baseline_cell(self, num_labels: int, draw: int) -> Cell:
        """Test errors of everything else with the same labels, %."""
        c = self.config
        models = self.models(draw)
        directories = [(c.output_dir / model_name(m)).parent for m in models]
        kind = digest([model_name(m) for m in models], c.supervised_steps, c.validation_labels)

        def compute() -> dict[str, Any]:
            x, picked, labels = self._training(num_labels, draw)
            own, (test_x, test_labels) = x[picked], self._test()
            errors = {}
            binary = self.data.likelihood == "bernoulli"
            for name, dropout, drawn in (("network", 0, 0), ("dropout", 1, 0), ("dropout_drawn", 1, 1)):
                if drawn and not binary:
                    continue
                network = supervised_network(
                    own, labels, self.data.num_classes, hidden_dim=models[0].hidden_dim, dropout=bool(dropout),
                    binary=bool(drawn), steps=c.supervised_steps, seed=draw,
                )  # fmt: skip
                with torch.no_grad():
                    errors[name] = error_percent(network(test_x.to(x.device)).argmax(-1), test_labels)
            validation_x, validation_labels = self._validation()
            features: dict[str, Any] = {"svm_pixels": lambda some: some}
            for name, directory in zip(("svm_csrae", "svm_vae"), directories, strict=True):
                model = load_model(directory)
                features[name] = lambda some, model=model: model.encode(some.cpu()).means
            for name, code in features.items():
                errors[name] = svm_error_percent(
                    (code(own), labels), (code(validation_x), validation_labels), (code(test_x), test_labels)
                )
            return errors

        return Cell(f"semisupervised/baselines-{num_labels}-{draw}-{kind}", compute, 5.0 + 0.01 * c.supervised_steps)

    def _training(self, num_labels: int, draw: int) -> tuple[Tensor, Tensor, Tensor]:
        """All samples, the labelled rows and their labels, on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        labels = self.data.train.labels
        assert labels is not None
        picked = balanced_rows(labels, num_labels, self.data.num_classes, draw)
        return self.data.train.x.to(device), picked.to(device), labels[picked].to(device)

    def _validation(self) -> tuple[Tensor, Tensor]:
        n = self.config.validation_labels
        assert self.data.validation.labels is not None
        return self.data.validation.x[:n], self.data.validation.labels[:n]

    def _test(self) -> tuple[Tensor, Tensor]:
        assert self.data.test.labels is not None
        return self.data.test.x, self.data.test.labels

    # report

    def errors(self, results: Results) -> dict[str, dict[int, list[float]]]:
        """Test errors of finished draws by row and number of labels."""
        found: dict[str, dict[int, list[float]]] = {}
        for n in self.config.labels:
            for draw in range(self.draws(n)):
                own = results.get(self.labelled_cell(n, draw, self.gamma(n, results)).name)
                if own:
                    found.setdefault(CSRAE_ROW, {}).setdefault(n, []).append(own["test_error"])
                for key, value in results.get(self.baseline_cell(n, draw).name, {}).items():
                    if key in BASELINES:
                        found.setdefault(BASELINES[key], {}).setdefault(n, []).append(value)
        return found

    def report(self, results: Results, figures: Path) -> StudyReport:
        """Of what is finished."""
        c, errors = self.config, self.errors(results)
        protocol = (
            f"{self.data.name}: {len(self.data.train.x)} training and {len(self.data.test.x)} test samples. For each "
            f"seed one CSRAE (K = {c.components}, λ = {c.weight:g}) and one VAE (β = {c.weight / 2:g}) are trained "
            "without labels, on binarised pixels drawn anew in each step. For each set of labels, as many of each "
            "class, a copy of the CSRAE gets a new prior, k-means of each class's labelled codes "
            f"(at most {c.components_per_class} components a class), and is trained on for {c.finetune_epochs} "
            "passes over all samples with γ times the cross-entropy of class logits "
            "LSE_{k∈y}(log π_k + log N(m; ν_k, s + t_k)) "
            f"added. γ, of {', '.join(f'{g:g}' for g in c.gammas)}, is chosen for each number of labels with the "
            f"first draw, and each SVM's C with every draw, by the labels of {c.validation_labels} validation samples "
            "at most: more labels than the smallest sets have. Encoders and networks see gray levels in tests."
        )
        table: list[list[Value]] = []
        for row in (CSRAE_ROW, *BASELINES.values()):
            values: list[Value] = [row]
            for n in c.labels:
                own = errors.get(row, {}).get(n, [])
                spread = float(np.std(own, ddof=1)) if len(own) > 1 else None
                values += [float(np.mean(own)) if own else None, spread, len(own)]
            table.append(values)
        heads = [f"{n} labels: {what}" for n in c.labels for what in ("test error (%)", "sd over draws (%)", "draws")]
        choice: list[list[Value]] = []
        for n in c.labels:
            for gamma in c.gammas:
                result = results.get(self.labelled_cell(n, 0, gamma).name, {})
                state = "chosen" if gamma == self.gamma(n, results) else ""
                choice.append([n, gamma, result.get("components"), result.get("validation_error"), state])
        tables = [
            Table("errors", "Test errors", ("model", *heads), table, "Means over draws."),
            Table("gamma", "Choice of γ, first draw", ("labels", "γ", "K", "validation error (%)", ""), choice),
        ]
        stopped = [
            f"Seed {seed}: {options.model} stopped itself, so that its draws are left out: {found['stopped']}."
            for seed in range(c.seeds)
            for options in self.models(seed)
            if "stopped" in (found := results.get(model_name(options), {}))
        ]
        return StudyReport(
            f"Semi-supervised learning on {self.data.name}", [protocol, *stopped, *self._verdicts(errors)], tables,
            self._figure(errors, figures),
        )  # fmt: skip

    def _verdicts(self, errors: dict[str, dict[int, list[float]]]) -> list[str]:
        found = []
        for n in self.config.labels:
            means = {row: float(np.mean(own[n])) for row, own in errors.items() if own.get(n)}
            if CSRAE_ROW not in means or DROPOUT_ROW not in means:
                continue
            own = means.pop(CSRAE_ROW)
            side = "below" if own < means[DROPOUT_ROW] else "not below"
            best = min(means, key=lambda row: means[row])
            found.append(
                f"{n} labels: CSRAE {own:.2f} %, {side} the supervised network with dropout, "
                f"{means[DROPOUT_ROW]:.2f} %; the best of the others is {best}, {means[best]:.2f} %."
            )
        return found

    def _figure(self, errors: dict[str, dict[int, list[float]]], directory: Path) -> dict[str, str]:
        if not errors:
            return {}
        directory.mkdir(parents=True, exist_ok=True)
        with rc_context(STYLE):
            figure = Figure((8, 3.6), layout="constrained")
            ax = figure.subplots()
            for i, (row, own) in enumerate(errors.items()):
                sizes = list(own)
                ax.plot(sizes, [np.mean(own[n]) for n in sizes], "o-", color=f"C{i}", markersize=4, label=row,
                        linewidth=2.2 if row == CSRAE_ROW else 1)  # fmt: skip
            ax.set(xscale="log", yscale="log", xlabel="labelled samples", ylabel="test error (%)")
            sizes = list(self.config.labels)
            ax.set_xticks(sizes, [str(n) for n in sizes])
            ax.set_xticks([], minor=True)
            low, high = ax.get_ylim()
            ticks = [t for t in (1, 2, 5, 10, 20, 50) if low <= t <= high]
            ax.set_yticks(ticks, [str(t) for t in ticks])
            ax.set_yticks([], minor=True)
            ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
            figure.savefig(directory / "errors.png", dpi=150)
        return {"errors.png": "Test error over the number of labels, means over draws; both axes logarithmic."}
