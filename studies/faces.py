"""Few images of many identities: what components, codes and their neighbours say about who is shown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from csdiv.models.autoencoder import CSRAE, VAE, Autoencoder
from csdiv.models.checkpoint import load_weights, save_weights
from csdiv.models.config import Option
from csdiv.models.data import Dataset, mix_seed
from csdiv.models.figures import STYLE, draw_images
from csdiv.models.initialisation import initialize_from_codes_
from csdiv.models.networks import NOISE_FLOOR, GaussianDecoder, Standardize, build_networks
from csdiv.nn import GaussianMixturePrior
from csdiv.studies.cells import Cell, Results, digest
from csdiv.studies.config import StudyConfig
from csdiv.studies.report import StudyReport, Table, Value

NAMES = {"vae": "VAE, N(0, I)", "csrae": "CSRAE", "pca": "PCA", "pixels": "pixels"}


@dataclass(frozen=True)
class FacesConfig(StudyConfig):
    """Options of the study, the table [faces] of a protocol."""

    train_per_identity: Annotated[int, Option("Images of each identity for training; the rest tests.", at_least=1)] = 5
    shrink: Annotated[int, Option("Images are averaged over blocks of so many pixels a side.", at_least=1)] = 2
    noise: Annotated[float, Option("Standard deviation of the Gaussian likelihood, gray levels.", at_least=0.02)] = 0.1
    weight: Annotated[float, Option("λ; the VAE gets β = λ / 2.", above=0)] = 1.0
    components: Annotated[int, Option("K.", at_least=1)] = 40
    pca_dim: Annotated[int, Option("Principal components.", at_least=1)] = 40
    latent_dim: Annotated[int, Option("D of the codes.", at_least=1)] = 20
    hidden_dim: Annotated[int, Option("Width of the hidden layers.", at_least=1)] = 256
    steps: Annotated[int, Option("Of Adam, warm-up included.", at_least=2)] = 2000
    warmup_steps: Annotated[int, Option("As a VAE, before k-means on the codes.", at_least=1)] = 300
    batch_size: Annotated[int, Option("Samples in one step.", at_least=1)] = 50
    learning_rate: Annotated[float, Option("Peak of a one-cycle schedule.", above=0)] = 1e-3


@dataclass(frozen=True)
class Faces:
    """Training and test images (n, P) with gray levels in [0, 1], their identities (n,), and the shape of an image."""

    train_x: Tensor
    train_labels: Tensor
    test_x: Tensor
    test_labels: Tensor
    shape: tuple[int, ...]


def split_identities(data: Dataset, per_identity: int, seed: int, shrink: int = 1) -> Faces:
    """So many images of each identity for training, chosen by the seed, and all others for testing.

    Args:
        data: all its splits are put together first.
        shrink: images are averaged over blocks of so many pixels a side; rows and columns beyond whole blocks are cut.

    Raises:
        ValueError: no images or labels, or an identity with no image left to test.
    """
    parts = (data.train, data.validation, data.test)
    if not data.is_image or any(part.labels is None for part in parts):
        raise ValueError("data: images with an identity each, as labels or subfolders, expected")
    x, labels = torch.cat([p.x for p in parts]), torch.cat([p.labels for p in parts if p.labels is not None])
    if int(torch.bincount(labels, minlength=data.num_classes).min()) <= per_identity:
        raise ValueError(f"data: more than train_per_identity = {per_identity} images of each identity expected")
    images = (
        F.avg_pool2d(x.unflatten(-1, data.sample_shape), shrink) if shrink > 1 else x.unflatten(-1, data.sample_shape)
    )
    x = images.flatten(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(mix_seed(seed, 5)))
    ranks = [order[labels[order] == y] for y in range(data.num_classes)]
    train, test = torch.cat([r[:per_identity] for r in ranks]), torch.cat([r[per_identity:] for r in ranks])
    return Faces(x[train], labels[train], x[test], labels[test], tuple(images.shape[1:]))


def build(config: FacesConfig, model: str, faces: Faces) -> Autoencoder:
    """A VAE or CSRAE whose Gaussian likelihood has the fixed variance ``config.noise``², the same for every pixel."""
    encoder, decoder = build_networks("mlp", "gaussian", faces.shape, config.latent_dim, config.hidden_dim)
    assert isinstance(decoder, GaussianDecoder)
    with torch.no_grad():
        mean = faces.train_x.mean(0)
        for module in encoder.modules():
            if isinstance(module, Standardize):
                module.shift.copy_(mean)
                module.scale.fill_(float((faces.train_x - mean).std()))
        decoder.shift.copy_(mean)
        decoder.log_variance.fill_(math.log(config.noise**2 - NOISE_FLOOR)).requires_grad_(False)
    if model == "vae":
        return VAE(encoder, decoder, config.weight / 2.0)
    k = min(config.components, len(faces.train_x))
    return CSRAE(encoder, decoder, GaussianMixturePrior(k, config.latent_dim), config.weight)


def fit(model: Autoencoder, x: Tensor, config: FacesConfig, seed: int) -> Autoencoder:
    """Trains in place on x (n, P), a CSRAE after a VAE warm-up and k-means on its codes. Returns the model."""
    generator = torch.Generator(x.device).manual_seed(mix_seed(seed, 7))
    warmup = VAE(model.encoder, model.decoder, config.weight / 2.0).to(x.device) if isinstance(model, CSRAE) else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.1)
    for step in range(config.steps):
        if step == config.warmup_steps and isinstance(model, CSRAE):
            codes = model.encode(x)
            assert codes.variances is not None
            initialize_from_codes_(model.prior, codes.means, codes.variances, seed=seed)
        active = warmup if step < config.warmup_steps else model
        rows = torch.randint(len(x), (config.batch_size,), generator=generator, device=x.device)
        loss = active(x[rows]).loss
        if not loss.isfinite():
            raise ArithmeticError(f"faces: the loss is not finite at step {step}; a smaller learning_rate may help")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def nearest_neighbour_error(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Share of test samples whose nearest training sample, by distance, has another label, %."""
    return 100.0 * float((labels[torch.cdist(test, train).argmin(-1)] != truth).double().mean())


def principal_components(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean (P,) and directions (P, dim) of x (n, P); fewer than dim where there are fewer samples."""
    mean = x.mean(0)
    return mean, torch.linalg.svd(x - mean, full_matrices=False).Vh[:dim].T


class FacesStudy:
    """The cells of the study, one for each model and seed, and the report made of their results."""

    def __init__(self, config: FacesConfig, data: Dataset) -> None:
        self.config, self.data = config, data
        split_identities(data, config.train_per_identity, 0)

    def cells(self, results: Results) -> list[Cell]:
        return [self.cell(model, seed) for seed in range(self.config.seeds) for model in ("vae", "csrae", "others")]

    def cell(self, model: str, seed: int) -> Cell:
        c = self.config
        options = {
            name: value for name, value in vars(c).items() if name not in ("data", "output_dir", "seeds", "train")
        }
        name = f"faces/{model}-seed{seed}-{digest(options)}"
        pixels = self.data.num_features / c.shrink**2
        work = 1.0 if model == "others" else c.steps * (5e-3 + 1.2e-9 * c.batch_size * c.hidden_dim * pixels / 100)

        def compute() -> dict[str, Any]:
            faces = split_identities(self.data, c.train_per_identity, seed, c.shrink)
            if model == "others":
                return self._others(faces)
            torch.manual_seed(seed)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            trained = fit(build(c, model, faces).to(device), faces.train_x.to(device), c, seed).cpu()
            path = c.output_dir / f"{name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_weights(path.parent, trained, path.name)
            return self._scores(trained, faces)

        return Cell(name, compute, work)

    def _scores(self, model: Autoencoder, faces: Faces) -> dict[str, Any]:
        train, test = model.encode(faces.train_x), model.encode(faces.test_x)
        decoded = model.reconstruct(faces.test_x)
        error = nearest_neighbour_error(train.means, faces.train_labels, test.means, faces.test_labels)
        found = {"nearest_neighbour_error": error, "test_rmse": float((decoded - faces.test_x).square().mean().sqrt())}
        if isinstance(model, CSRAE):
            prior = model.prior_mixture().detach()
            own, other = prior.assign(train), prior.assign(test)
            counts = F.one_hot(own, prior.num_components).T @ F.one_hot(faces.train_labels)
            found |= {
                "components": prior.num_components,
                "used": int(own.unique().numel()),
                "component_error": 100.0 * float((counts.argmax(-1)[other] != faces.test_labels).double().mean()),
                "purity": float(counts.amax(-1).sum() / counts.sum()),
            }
        return found

    def _others(self, faces: Faces) -> dict[str, Any]:
        labels = faces.train_labels, faces.test_labels
        mean, directions = principal_components(faces.train_x, self.config.pca_dim)
        train, test = (faces.train_x - mean) @ directions, (faces.test_x - mean) @ directions
        decoded = mean + test @ directions.T
        return {
            "pixels": nearest_neighbour_error(faces.train_x, labels[0], faces.test_x, labels[1]),
            "pca": nearest_neighbour_error(train, labels[0], test, labels[1]),
            "pca_dim": directions.shape[-1],
            "pca_rmse": float((decoded - faces.test_x).square().mean().sqrt()),
            "shape": list(faces.shape),
            "sizes": [len(faces.train_x), len(faces.test_x)],
        }

    # report

    def report(self, results: Results, figures: Path) -> StudyReport:
        """Of what is finished."""
        c = self.config
        found = {m: [results[n] for s in range(c.seeds) if (n := self.cell(m, s).name) in results]
                 for m in ("vae", "csrae", "others")}  # fmt: skip
        values: dict[str, dict[str, list[float]]] = {
            m: {k: [r[k] for r in found[m]] for k in ("nearest_neighbour_error", "test_rmse")} for m in ("csrae", "vae")
        }
        values["pca"] = {"nearest_neighbour_error": [r["pca"] for r in found["others"]],
                         "test_rmse": [r["pca_rmse"] for r in found["others"]]}  # fmt: skip
        values["pixels"] = {"nearest_neighbour_error": [r["pixels"] for r in found["others"]], "test_rmse": []}
        dims = {"csrae": c.latent_dim, "vae": c.latent_dim, "pca": c.pca_dim, "pixels": None}
        if found["others"]:
            dims |= {"pca": found["others"][0]["pca_dim"], "pixels": math.prod(found["others"][0]["shape"])}
        table: list[list[Value]] = []
        for row, scores in values.items():
            errors = scores["nearest_neighbour_error"]
            table.append([NAMES[row], dims[row], _mean(errors), _deviation(errors), _mean(scores["test_rmse"]),
                          len(errors)])  # fmt: skip
        columns = ("features", "dimensions", "1-NN identity error (%)", "sd over seeds (%)",
                   "root mean square error of decoded test images (gray levels)", "seeds")  # fmt: skip
        title = "Identities of test images, and how they are decoded"
        tables = [Table("identities", title, columns, table, "Means over seeds.", digits=3)]
        if found["csrae"]:
            keys = ("components", "used", "purity", "component_error")
            rows: list[list[Value]] = [[s, *(r[k] for k in keys)] for s, r in enumerate(found["csrae"])]
            heads = ("seed", "K", "components used by training images", "purity of training images",
                     "error of a component's majority identity, test (%)")  # fmt: skip
            tables.append(Table("components", "CSRAE's components as identities", heads, rows))
        drawn = self._figures(results, figures)
        return StudyReport(self._title(), [*self._protocol(found), *_verdict(values)], tables, drawn)

    def _title(self) -> str:
        smoke = ": a smoke run on handwritten digits, not faces" if self.data.name == "digits" else ""
        return f"Identities on {self.data.name}{smoke}"

    def _protocol(self, found: dict[str, list[dict[str, Any]]]) -> list[str]:
        c = self.config
        if not found["others"]:
            return []
        (train, test), shape = found["others"][0]["sizes"], found["others"][0]["shape"]
        small = f"averaged over blocks of {c.shrink} x {c.shrink} pixels to " if c.shrink > 1 else "of "
        return [
            f"{train} training images, {c.train_per_identity} of each of {self.data.num_classes} identities chosen by "
            f"the seed, and the other {test} for testing, {small}{shape[1]} x {shape[2]} pixels. Nothing is "
            f"trained on labels. Perceptrons with two hidden layers of {c.hidden_dim}, {c.latent_dim}-dimensional "
            "codes; "
            f"Gaussian likelihood with the fixed standard deviation {c.noise:g}, gray levels being in [0, 1]. "
            f"λ = {c.weight:g} for CSRAE with K = {c.components}, β = {c.weight / 2:g} for the VAE; {c.steps} steps of "
            f"{c.batch_size} images, of which CSRAE's first {c.warmup_steps} are a VAE's, then k-means on codes. No "
            "option was chosen by test images. 1-NN: nearest training image by Euclidean distance, of code means for "
            "the autoencoders."
        ]

    def _figures(self, results: Results, directory: Path) -> dict[str, str]:
        name = self.cell("csrae", 0).name
        path = self.config.output_dir / f"{name}.safetensors"
        if name not in results or not path.exists():
            return {}
        faces = split_identities(self.data, self.config.train_per_identity, 0, self.config.shrink)
        model = build(self.config, "csrae", faces)
        load_weights(path, model)
        directory.mkdir(parents=True, exist_ok=True)
        model.eval()
        captions = {}
        with rc_context(STYLE), torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            for file, (images, columns, caption) in _pictures(model, faces).items():
                rows, aspect = -(-len(images) // columns), faces.shape[1] / faces.shape[2]
                figure = Figure((8, 8 * rows * aspect / columns + 0.1), layout="constrained")
                # Faces are photographs: light is high, where draw_images takes ink to be.
                draw_images(figure.subplots(), 1 - images if faces.shape[0] == 1 else images, faces.shape, columns)
                figure.savefig(directory / file, dpi=150)
                captions[file] = caption
        return captions


def _pictures(model: Autoencoder, faces: Faces) -> dict[str, tuple[Tensor, int, str]]:
    """Images (n, P), how many in a row, and a caption, of seed 0."""
    prior = model.prior_mixture()
    weights = torch.zeros(len(prior.means)) if prior.log_weights is None else prior.log_weights
    order = weights.argsort(descending=True)
    assert prior.variances is not None
    means, scales = prior.means[order[:8]], prior.variances[order[:8]].sqrt()
    draws = means.unsqueeze(1) + scales.unsqueeze(1) * torch.randn(len(means), 9, means.shape[-1])
    samples = torch.cat([model.decoder(means).unsqueeze(1), model.decoder(draws)], 1).flatten(0, 1)
    first = [int((faces.test_labels == y).nonzero()[0]) for y in faces.test_labels.unique().tolist()[:12]]
    half = len(first) // 2
    start, end = faces.test_x[first[:half]], faces.test_x[first[half : 2 * half]]
    lines = torch.cat([start.unsqueeze(1), model.interpolate(start, end, 8), end.unsqueeze(1)], 1).flatten(0, 1)
    shown = torch.cat([faces.test_x[first], model.reconstruct(faces.test_x[first])])
    return {
        "prototypes.png": (model.prototypes()[order], 10, "Prototypes: decoded component means, heaviest first."),
        "components.png": (samples, 10, "One component a row: its prototype, then decoded draws from the component."),
        "interpolations.png": (lines, 10, "Between identities: a test image, eight decoded codes on the line between "
                               "two code means, and the other test image."),
        "reconstructions.png": (shown, len(first), "Test images, and their decoded code means below."),
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _verdict(values: dict[str, dict[str, list[float]]]) -> list[str]:
    """How CSRAE's codes compare with everything else, in words."""
    errors = {row: _mean(scores["nearest_neighbour_error"]) for row, scores in values.items()}
    known = {row: error for row, error in errors.items() if error is not None}
    if "csrae" not in known or len(known) < 2:
        return []
    own = known.pop("csrae")
    parts = [f"{'below' if own < e else 'above' if own > e else 'the same as'} {NAMES[row]} ({e:.2f} %)"
             for row, e in known.items()]  # fmt: skip
    return [f"The 1-NN identity error of CSRAE's codes is {own:.2f} %: {', '.join(parts)}."]
