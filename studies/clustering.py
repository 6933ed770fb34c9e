"""Unsupervised clustering: a prior's components beside k-means and mixtures fitted to the same codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from csdiv.models.checkpoint import load_model
from csdiv.models.config import Option, TrainConfig
from csdiv.models.data import Dataset, binarize
from csdiv.models.evaluation import TEST_SEED, TRAIN_SEED, match_clusters, merge_components, score_clusters
from csdiv.models.figures import STYLE, draw_prototypes
from csdiv.models.networks import BernoulliDecoder
from csdiv.studies.cells import Cell, Results, digest, model_name, training_cell
from csdiv.studies.config import ABLATIONS, StudyConfig
from csdiv.studies.report import StudyReport, Table, Value

Assignments = tuple[Tensor, Tensor]
"""Clusters of the training and of the test split, (n,) int64."""


@dataclass(frozen=True)
class ClusteringConfig(StudyConfig):
    """Options of the study, the table [clustering] of a protocol."""

    weight: Annotated[float, Option("λ of CSRAE; the VAE has β = λ / 2.", above=0)] = 1.0
    many_components: Annotated[int, Option("K of the second model, above the number of classes.", at_least=2)] = 50
    kmeans_starts: Annotated[int, Option("Of which k-means keeps the best.", at_least=1)] = 10
    ablation_weights: Annotated[tuple[float, ...], Option("Other λ, for the ablations.", above=0)] = (0.6, 2.0)


class ClusteringStudy:
    """CSRAE with as many components as classes, and with more; k-means and mixtures on its codes, a VAE's and pixels.

    Args:
        config: options.
        data: with labels, which serve to score and to name clusters only.

    Raises:
        ValueError: data without labels, or not more components than classes.
    """

    def __init__(self, config: ClusteringConfig, data: Dataset) -> None:
        if data.train.labels is None:
            raise ValueError("the study 'clustering': labelled data expected")
        if config.many_components <= data.num_classes:
            raise ValueError(f"many_components: above {data.num_classes}, the number of classes, expected")
        self.config, self.data = config, data
        self.sizes = (data.num_classes, config.many_components)

    def cells(self, results: Results) -> list[Cell]:
        """Pixels once; seed by seed, models and their scores; then the ablations."""
        found = [self._pixels()]
        for training in (*self._headline(), *self._ablations().values()):
            found += [training_cell(training, self.data, self.config.output_dir)]
            found += [self._score(training)] if not self._stopped(training, results) else []
        return list({cell.name: cell for cell in found}.values())

    def _headline(self) -> list[TrainConfig]:
        seeds, weight = range(self.config.seeds), self.config.weight
        return [
            training
            for seed in seeds
            for training in (
                *(self._csrae(k, seed) for k in self.sizes),
                self.config.training("vae", weight, 1, seed),
            )
        ]

    def _ablations(self) -> dict[str, TrainConfig]:
        """CSRAE with as many components as classes and one option changed, seed 0."""
        classes, epochs = self.sizes[0], self._csrae(self.sizes[0], 0).epochs
        others = ABLATIONS | {"half of the epochs as warm-up": {"warmup_epochs": epochs // 2}}
        weights = self.config.ablation_weights
        return {f"λ = {w:g}": self.config.training("csrae", w, classes, 0) for w in weights} | {
            name: self._csrae(classes, 0, **options) for name, options in others.items()
        }

    def _csrae(self, num_components: int, seed: int, **options: Any) -> TrainConfig:
        return self.config.training("csrae", self.config.weight, num_components, seed, **options)

    def _stopped(self, training: TrainConfig, results: Results) -> bool:
        return "stopped" in results.get(model_name(training), {})

    def _directory(self, training: TrainConfig) -> Path:
        return (self.config.output_dir / model_name(training)).parent

    def _score(self, training: TrainConfig) -> Cell:
        directory, starts = self._directory(training), self.config.kmeans_starts
        sizes = self.sizes if training.model == "vae" else (training.num_components,)

        def compute() -> dict[str, Any]:
            return scores_of_model(directory, self.data, sizes, starts, training.seed)

        name = f"clustering/{directory.name}-{digest(sizes, starts)}"
        return Cell(name, compute, 2e-5 * len(self.data.train.x) * sum(sizes))

    def _pixels(self) -> Cell:
        starts = self.config.kmeans_starts

        def compute() -> dict[str, Any]:
            train, test = self.data.train.x, self.data.test.x
            return {"rows": [row for k in self.sizes for row in baselines("pixels", train, test, self.data, k, starts)]}

        work = 1e-7 * len(self.data.train.x) * self.data.num_features * sum(self.sizes)
        return Cell(f"clustering/pixels-{digest(self.data.name, self.sizes, starts)}", compute, work)

    # report

    def report(self, results: Results, figures: Path) -> StudyReport:
        """Of what is finished."""
        classes, many = self.sizes
        rows: dict[tuple[str, str, int, str], list[dict[str, float]]] = {}
        for cell in (self._pixels(), *map(self._score, self._headline())):
            for row in results.get(cell.name, {"rows": []})["rows"]:
                key = (row["method"], row["features"], row["num_clusters"], row["matching"])
                rows.setdefault(key, []).append(row)
        few = [key for key in rows if key[2] == classes and "merged" not in key[0]]
        rest = [key for key in rows if key not in few]
        protocol = (
            f"{self.data.name}: clusters are found on {len(self.data.train.x)} training samples without labels. Which "
            "class a cluster stands for is decided by labels of the training samples: the best matching that uses each "
            "class once (one-to-one), or each cluster's majority (many-to-one), which favours large K: figures of "
            f"different K or matching are not comparable. Scores are of {len(self.data.test.x)} test samples. The VAE "
            f"has β = {self.config.weight / 2:g}, CSRAE λ = {self.config.weight:g}, chosen beforehand, not by scores. "
            "Codes are of binarised pixels where the likelihood is Bernoulli; the rows of pixels take gray levels."
        )
        tables = [
            self._table("few", f"K = {classes}, as many as classes", few, rows),
            self._table("many", f"K = {many}, and merged by overlaps without labels to {classes}", rest, rows),
            self._ablation_table(results),
        ]
        stopped = [
            f"CSRAE, K = {k}, seed {seed}: {results[name]['stopped']}."
            for k in self.sizes
            for seed in range(self.config.seeds)
            if "stopped" in results.get(name := model_name(self._csrae(k, seed)), {})
        ]
        paragraphs = [protocol, *stopped, *self._verdicts(rows)]
        return StudyReport(f"Clustering of {self.data.name}", paragraphs, tables, self._figures(results, figures))

    def _table(
        self, name: str, title: str, keys: list[tuple[str, str, int, str]], rows: dict[Any, list[dict[str, float]]]
    ) -> Table:
        shown: list[list[Value]] = []
        for key in sorted(keys, key=lambda key: (key[3], -_mean(rows[key], "accuracy"))):
            accuracies = [row["accuracy"] for row in rows[key]]
            spread = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
            measured = [_mean(rows[key], score) for score in ("accuracy", "nmi", "ari")]
            shown.append([*key, len(accuracies), measured[0], spread, *measured[1:]])
        columns = ("clusters", "of", "K", "matching", "seeds", "accuracy", "sd over seeds", "NMI", "ARI")
        return Table(name, title, columns, shown, "Accuracies, NMI and ARI in [0, 1], means over seeds.", digits=3)

    def _ablation_table(self, results: Results) -> Table:
        classes = self.sizes[0]
        compared = {f"as above, λ = {self.config.weight:g}": self._csrae(classes, 0)} | self._ablations()
        shown: list[list[Value]] = []
        for name, training in compared.items():
            if stopped := results.get(model_name(training), {}).get("stopped"):
                shown.append([f"{name}: {stopped}", *[None] * 5])
            elif found := results.get(self._score(training).name):
                own = {row["method"]: row for row in found["rows"]}
                last, components = results.get(model_name(training), {}), own["components"]
                shown.append([name, *(components[score] for score in ("accuracy", "nmi", "ari")),
                              own["k-means"]["accuracy"], last.get("effective_components")])  # fmt: skip
        columns = ("CSRAE", f"one-to-one accuracy, K = {classes}", "NMI", "ARI",
                   f"one-to-one accuracy of k-means {classes} on its codes", "effective components")  # fmt: skip
        title = f"Ablations: CSRAE of K = {classes}, seed 0, one option changed"
        return Table("ablations", title, columns, shown, digits=3)

    def _verdicts(self, rows: dict[Any, list[dict[str, float]]]) -> list[str]:
        found = []
        for k, matching in zip(self.sizes, ("one-to-one", "many-to-one"), strict=True):
            ours = rows.get(("components", f"CSRAE codes, K = {k}", k, matching))
            theirs = rows.get(("k-means", "VAE codes", k, matching))
            if ours and theirs:
                difference = _mean(ours, "accuracy") - _mean(theirs, "accuracy")
                found.append(
                    f"{matching} accuracy at K = {k}: the components of CSRAE {_mean(ours, 'accuracy'):.3f}, k-means "
                    f"on VAE codes {_mean(theirs, 'accuracy'):.3f}, a difference of {difference:+.3f}."
                )
        return found

    def _figures(self, results: Results, directory: Path) -> dict[str, str]:
        directory.mkdir(parents=True, exist_ok=True)
        captions = {}
        with rc_context(STYLE):
            for k in self.sizes:
                training = self._csrae(k, 0)
                result = results.get(self._score(training).name)
                if result is None:
                    continue
                figure = Figure((9, 4), layout="constrained")
                left, right = figure.subplots(1, 2)
                if self.data.is_image:
                    draw_prototypes(left, load_model(self._directory(training)), self.data.sample_shape, 10)
                    left.set_title(f"prototypes and weights, K = {k}")
                _draw_confusion(right, np.array(result["confusion"]), self.data.class_names)
                matching = result["rows"][0]["matching"]
                right.set_title(f"{matching}, K = {k}")
                name = f"components-{k}.png"
                figure.savefig(directory / name, dpi=150)
                captions[name] = (
                    f"CSRAE, K = {k}, seed 0: decoded component means with their weights; test samples by class and by "
                    f"the class that their component stands for ({matching})."
                )
        return captions


def scores_of_model(
    directory: Path, data: Dataset, sizes: tuple[int, ...], starts: int, seed: int
) -> dict[str, list[Any]]:
    """Scores of a model's components, if it has as many, merged ones too, and of baselines with ``sizes`` clusters.

    The result has "rows" and, of a model with components, "confusion": counts (classes, classes) of the test split.
    """
    model = load_model(directory)
    train_x, test_x = data.train.x, data.test.x
    if isinstance(model.decoder, BernoulliDecoder):
        train_x, test_x = binarize(train_x, TRAIN_SEED), binarize(test_x, TEST_SEED)
    codes = model.encode(train_x), model.encode(test_x)
    prior, rows, confusion = model.prior_mixture().detach(), [], []
    k = prior.num_components
    features = "VAE codes" if k == 1 else f"CSRAE codes, K = {k}"
    if k > 1:
        found = prior.assign(codes[0]), prior.assign(codes[1])
        rows.append(scored("components", features, found, data, k))
        confusion = _confusion(found, data, k).tolist()
        if k > data.num_classes:
            group = merge_components(prior, data.num_classes)
            merged = group[found[0]], group[found[1]]
            rows.append(scored("components, merged by overlap", features, merged, data, data.num_classes))
    for size in sizes:
        rows += baselines(features, codes[0].means, codes[1].means, data, size, starts, seed=seed)
    return {"rows": rows, "confusion": confusion}


def baselines(
    features: str, train: Tensor, test: Tensor, data: Dataset, num_clusters: int, starts: int, *, seed: int = 0
) -> list[dict[str, Any]]:
    """k-means and a diagonal mixture fitted by expectation maximisation, of features (n, F) of both splits."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture as Estimator

    sides = train.cpu().numpy().astype(np.float64), test.cpu().numpy().astype(np.float64)
    kmeans = KMeans(num_clusters, n_init=starts, random_state=seed).fit(sides[0])
    mixture = Estimator(
        num_clusters, covariance_type="diag", means_init=kmeans.cluster_centers_, reg_covar=1e-3, random_state=seed
    ).fit(sides[0])

    def assigned(predict: Callable[[np.ndarray], np.ndarray]) -> Assignments:
        first, second = (torch.as_tensor(predict(side), dtype=torch.int64) for side in sides)
        return first, second

    return [
        scored("k-means", features, assigned(kmeans.predict), data, num_clusters),
        scored("mixture by EM", features, assigned(mixture.predict), data, num_clusters),
    ]


def scored(method: str, features: str, found: Assignments, data: Dataset, num_clusters: int) -> dict[str, Any]:
    """Scores of one clustering, named."""
    return {"method": method, "features": features} | asdict(score_clusters(method, *found, num_clusters, data))


def _confusion(found: Assignments, data: Dataset, k: int) -> Tensor:
    """Test samples by class and by the class that their cluster stands for: (C, C) counts."""
    assert data.train.labels is not None
    assert data.test.labels is not None
    c = data.num_classes
    match = match_clusters(found[0], data.train.labels, k, c, one_to_one=k == c)
    said = match[found[1]]
    known = said >= 0
    return torch.bincount(data.test.labels[known] * c + said[known], minlength=c * c).view(c, c)


def _draw_confusion(ax: Axes, counts: np.ndarray, names: tuple[str, ...]) -> None:
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5,
                    color="white" if share > 0.6 else "black")  # fmt: skip
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("class of the component (% of the row)")
    ax.set_ylabel("class")


def _mean(rows: list[dict[str, float]], score: str) -> float:
    return float(np.mean([row[score] for row in rows]))
