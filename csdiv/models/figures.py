"""Figures of a run; each ``draw_*`` fills one axes, ``save_figures`` composes them into files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from csdiv import GaussianMixture
from csdiv.models.autoencoder import CSRAE, Autoencoder
from csdiv.models.data import Dataset
from csdiv.models.evaluation import Evaluation, merge_components
from csdiv.models.folder import FIGURES, write

STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw_images(
    ax: Axes, images: Tensor, shape: Sequence[int], columns: int, captions: Sequence[str] | None = None
) -> None:
    """Images (n, C H W) with levels in [0, 1] in rows of ``columns``, gray ones with ink dark, a caption below each."""
    channels, height, width = shape
    below = max(2, height // 3) if captions else 2
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (height + below), columns * (width + 1) + 1, channels), np.nan)
    for i, image in enumerate(images.cpu().reshape(-1, *shape).movedim(1, -1).numpy()):
        top, left = (i // columns) * (height + below), 1 + (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image.clip(0, 1)
        if captions:
            place = (left + width / 2 - 0.5, top + height + below / 2 - 0.8)
            ax.text(*place, captions[i], ha="center", va="center", fontsize=5.5)
    if channels == 3:
        ax.imshow(np.nan_to_num(canvas, nan=1.0), interpolation="nearest")
    else:
        ax.imshow(canvas[:, :, 0], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()


def draw_prototypes(ax: Axes, model: Autoencoder, shape: Sequence[int], columns: int = 10, rows: int = 10) -> None:
    """Decoded component means, heaviest first, with their weights; those of least weight are left out if need be."""
    weights = _weights(model.prior_mixture())
    order = weights.argsort(descending=True)[: columns * rows]
    draw_images(ax, model.prototypes()[order], shape, columns, [f"{100 * w:.1f} %" for w in weights[order].tolist()])


def save_image_grid(file: IO[bytes], images: Tensor, shape: Sequence[int], columns: int) -> None:
    """Images as one PNG file, in rows of ``columns``."""
    rows, aspect = -(-len(images) // columns), shape[1] / shape[2]
    figure = Figure((0.6 * columns, 0.65 * rows * aspect + 0.1), layout="constrained")
    draw_images(figure.subplots(), images, shape, columns)
    figure.savefig(file, dpi=150, format="png")


def embed(codes: Tensor, prior: GaussianMixture) -> tuple[np.ndarray, np.ndarray]:
    """A t-SNE map of code means (n, D) and component means (K, D) together: (n, 2), (K, 2)."""
    from sklearn.manifold import TSNE

    points = torch.cat([codes, prior.means]).cpu().numpy()
    xy = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(points)
    return xy[: len(codes)], xy[len(codes) :]


def draw_codes(ax: Axes, xy: np.ndarray, values: Tensor, colours: np.ndarray, names: Sequence[str] = ()) -> None:
    """Mapped codes (n, 2) coloured by an integer value, (n,); ``names`` of the values make a legend."""
    ax.scatter(xy[:, 0], xy[:, 1], s=9, color=colours[values.cpu().numpy()], linewidths=0)
    for name, colour in zip(names, colours, strict=False):
        ax.scatter([], [], s=30, color=colour, label=name)
    if names:
        ax.legend(title="label", fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_xlabel("t-SNE 1 (no unit)")
    ax.set_ylabel("t-SNE 2 (no unit)")


def draw_thumbnails(ax: Axes, xy: np.ndarray, images: Tensor, shape: Sequence[int], colours: np.ndarray) -> None:
    """Small framed images (K, C H W) at the mapped component means (K, 2)."""
    for position, image, colour in zip(xy, images.cpu().reshape(-1, *shape).numpy(), colours, strict=True):
        pixels = 1 - image[0].clip(0, 1) if len(image) == 1 else np.moveaxis(image.clip(0, 1), 0, -1)
        picture = OffsetImage(pixels, zoom=13 / shape[1], cmap="gray", norm=Normalize(0, 1), interpolation="nearest")
        frame = AnnotationBbox(picture, position, pad=0.1, bboxprops={"edgecolor": colour, "linewidth": 1.2})
        ax.add_artist(frame)


def component_colours(prior: GaussianMixture) -> np.ndarray:
    """Colours (K, 4): components that overlap most have neighbouring hues."""
    few = prior.num_components <= 1000  # merging takes a minute for 5000
    groups = merge_components(prior, min(10, prior.num_components)) if few else torch.arange(prior.num_components)
    hues = np.linspace(0, 1, prior.num_components, endpoint=False)[groups.argsort(stable=True).argsort().numpy()]
    return colormaps["hsv"](hues)


def draw_curve(ax: Axes, history: list[dict[str, Any]], term: str) -> None:
    """A term of the loss, training and validation, against the epoch; the warm-up is shaded."""
    epochs = [record["epoch"] + 1 for record in history]
    for split, style in (("train", "-"), ("validation", "--")):
        values = [record.get(f"{split}_{term}", np.nan) for record in history]  # a record may be damaged
        if not np.isnan(values).all():
            ax.plot(epochs, values, style, linewidth=1.2, label=split)
    if warmup := sum(record["stage"] == "warm-up" for record in history):
        ax.axvspan(0.5, warmup + 0.5, color="0.92", label="warm-up (VAE)")
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{term} (nats per sample)")
    ax.legend(frameon=False, fontsize=8)


def save_figures(
    directory: Path, model: Autoencoder, data: Dataset, evaluation: Evaluation, history: list[dict[str, Any]]
) -> dict[str, str]:
    """Writes the PNG files of a run's directory; returns {file name: caption} of all but overview.png, which repeats.

    Samples are drawn from the prior with torch's generator seeded, so the figures of one model are the same. The latent
    space is mapped for the first 2000 test codes; data that are no images have that map and the curves only.
    """
    (directory / FIGURES).mkdir(exist_ok=True)
    captions: dict[str, str] = {}

    def save(name: str, figure: Figure, caption: str = "") -> None:
        content = io.BytesIO()
        figure.savefig(content, dpi=150)
        write(directory, f"{FIGURES}/{name}", content.getvalue())
        if caption:
            captions[name] = caption

    with rc_context(STYLE), torch.no_grad():
        space = _LatentSpace(model, data, evaluation)
        if data.is_image:
            _save_image_figures(save, model, data, evaluation, space)
        figure = Figure((11, 5) if space.mixture else (7, 5), layout="constrained")
        left, *right = figure.subplots(1, 2 if space.mixture else 1, squeeze=False)[0]
        space.draw_classes(left)
        left.set_title("test codes by label" if data.num_classes else "test codes")
        for ax in right:
            space.draw_components(ax)
            ax.set_title("test codes by component" + (", prototypes at their means" if space.thumbnails else ""))
        save("latent.png", figure, "Latent space: a t-SNE map of the test codes; it keeps neighbours, not distances.")

        figure = Figure((11, 3.2), layout="constrained")
        for ax, term in zip(figure.subplots(1, 3), ("loss", "reconstruction", "divergence"), strict=True):
            draw_curve(ax, history, term)
        divergence = "KL in the warm-up, D_CS after it" if isinstance(model, CSRAE) else "KL"
        save("curves.png", figure, f"Training curves, per sample; the divergence is {divergence}.")
    return captions


class _LatentSpace:
    """A map of the test codes, drawn by label and by component."""

    def __init__(self, model: Autoencoder, data: Dataset, evaluation: Evaluation, size: int = 2000) -> None:
        prior = model.prior_mixture().detach()
        self.labels = data.test.labels
        self.names = [name.replace("$", r"\$") for name in data.class_names]  # no formulas
        self.components = evaluation.clustering.components[:size]
        self.codes, self.means = embed(model.encode(evaluation.test_x[:size]).means, prior)
        self.colours = component_colours(prior)
        self.mixture = prior.num_components > 1
        few = data.is_image and 1 < prior.num_components <= 100
        self.thumbnails = (model.prototypes(), data.sample_shape) if few else None

    def draw_classes(self, ax: Axes) -> None:
        if self.labels is None:
            draw_codes(ax, self.codes, torch.zeros(len(self.codes), dtype=torch.int64), np.array([(0.3, 0.3, 0.3, 1)]))
            return
        palette = colormaps["tab10" if len(self.names) <= 10 else "hsv"]
        many = np.arange(len(self.names)) / (1 if len(self.names) <= 10 else len(self.names))
        colours = palette(np.arange(len(self.names)) if len(self.names) <= 10 else many)
        draw_codes(ax, self.codes, self.labels[: len(self.codes)], colours, self.names if len(self.names) <= 20 else ())

    def draw_components(self, ax: Axes) -> None:
        draw_codes(ax, self.codes, self.components, self.colours)
        if self.thumbnails:
            draw_thumbnails(ax, self.means, *self.thumbnails, self.colours)


def _save_image_figures(
    save: Callable[..., None], model: Autoencoder, data: Dataset, evaluation: Evaluation, space: _LatentSpace
) -> None:
    shape = data.sample_shape
    aspect = shape[1] / shape[2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = model.sample(96)
    figure = Figure((11 if space.mixture else 8, 2.9), layout="constrained")
    first, *middle, last = figure.subplots(1, 3 if space.mixture else 2)
    draw_images(first, samples[:60], shape, 10)
    first.set_title("samples")
    space.draw_classes(last)
    last.set_title("test codes")
    for ax in middle:
        draw_prototypes(ax, model, shape, rows=6)
        ax.set_title("component prototypes and weights")
    save("overview.png", figure)

    figure = Figure((8, 6 * aspect), layout="constrained")
    draw_images(figure.subplots(), samples, shape, 12)
    save("samples.png", figure, "Samples: decoded draws from the prior (means of the likelihood).")

    size = min(14, len(evaluation.test_x))
    rows = {"image": data.test.x[:size], "decoded": model.reconstruct(evaluation.test_x[:size])}
    if evaluation.test_x is not data.test.x:
        rows = {"image": rows["image"], "binarised": evaluation.test_x[:size], "decoded": rows["decoded"]}
    figure = Figure((8, 0.75 * len(rows) * aspect), layout="constrained")
    ax = figure.subplots()
    draw_images(ax, torch.cat([row.cpu() for row in rows.values()]), shape, size)
    for i, name in enumerate(rows):
        ax.text(-1, i * (shape[1] + 2) + shape[1] / 2 - 0.5, name, ha="right", va="center")
    save("reconstructions.png", figure, "Reconstructions: test images, what the encoder sees, its decoded code mean.")

    pairs = min(6, len(evaluation.test_x) // 2)
    if pairs:
        lines = model.interpolate(evaluation.test_x[:pairs], evaluation.test_x[pairs : 2 * pairs], 12)
        figure = Figure((8, 0.66 * pairs * aspect + 0.1), layout="constrained")
        draw_images(figure.subplots(), lines.flatten(0, 1), shape, 12)
        save("interpolations.png", figure, "Interpolations: lines between the codes of two test images, decoded.")

    if space.mixture:
        count = min(100, model.prior_mixture().num_components)
        figure = Figure((8, (0.4 + 0.95 * -(-count // 10)) * aspect), layout="constrained")
        draw_prototypes(figure.subplots(), model, shape)
        save("prototypes.png", figure, "Prototypes: decoded component means with their weights, heaviest first.")


def _weights(mixture: GaussianMixture) -> Tensor:
    if mixture.log_weights is None:
        return mixture.means.new_full((mixture.num_components,), 1 / mixture.num_components)
    return mixture.log_weights.detach().softmax(-1)
