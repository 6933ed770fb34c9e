"""Figures of a run; each ``draw_*`` fills one axes, ``save_figures`` composes them into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

from csdiv import GaussianMixture
from csdiv.models.autoencoder import Autoencoder
from csdiv.models.data import ImageData
from csdiv.models.evaluation import Evaluation, merge_components

STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def draw_images(
    ax: Axes, images: Tensor, shape: tuple[int, int], columns: int, captions: Sequence[str] | None = None
) -> None:
    """Images (n, P) with gray levels in [0, 1] in rows of ``columns``, ink dark, a caption below each if given."""
    height, width = shape
    below = 4 if captions else 2
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (height + below), columns * (width + 1) + 1), np.nan)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = (i // columns) * (height + below), 1 + (i % columns) * (width + 1)
        canvas[top : top + height, left : left + width] = image.reshape(shape)
        if captions:
            ax.text(left + width / 2 - 0.5, top + height + 1.2, captions[i], ha="center", va="center", fontsize=5.5)
    ax.imshow(canvas, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_axis_off()


def draw_prototypes(ax: Axes, model: Autoencoder, shape: tuple[int, int], columns: int = 10) -> None:
    """Decoded component means, heaviest first, with their weights."""
    weights = _weights(model.prior_mixture())
    order = weights.argsort(descending=True)
    draw_images(ax, model.prototypes()[order], shape, columns, [f"{100 * w:.1f} %" for w in weights[order].tolist()])


def embed(codes: Tensor, prior: GaussianMixture) -> tuple[np.ndarray, np.ndarray]:
    """A t-SNE map of code means (n, D) and component means (K, D) together: (n, 2), (K, 2)."""
    from sklearn.manifold import TSNE

    points = torch.cat([codes, prior.means]).cpu().numpy()
    xy = TSNE(perplexity=min(30.0, (len(points) - 1) / 3), init="pca", random_state=0).fit_transform(points)
    return xy[: len(codes)], xy[len(codes) :]


def draw_codes(ax: Axes, xy: np.ndarray, values: Tensor, colours: np.ndarray, names: Sequence[str] = ()) -> None:
    """Mapped codes (n, 2) coloured by an integer value, (n,); ``names`` of the values make a legend."""
    ax.scatter(xy[:, 0], xy[:, 1], s=9, color=colours[values.cpu()], linewidths=0)
    for name, colour in zip(names, colours, strict=False):
        ax.scatter([], [], s=30, color=colour, label=name)
    if names:
        ax.legend(title="label", fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set_xlabel("t-SNE 1 (no unit)")
    ax.set_ylabel("t-SNE 2 (no unit)")


def draw_thumbnails(ax: Axes, xy: np.ndarray, images: Tensor, shape: tuple[int, int], colours: np.ndarray) -> None:
    """Small framed images (K, P) at the mapped component means (K, 2)."""
    for position, image, colour in zip(xy, images.cpu().numpy(), colours, strict=True):
        picture = OffsetImage(image.reshape(shape), zoom=1.6, cmap="gray_r", interpolation="nearest")
        frame = AnnotationBbox(picture, position, pad=0.1, bboxprops={"edgecolor": colour, "linewidth": 1.2})
        ax.add_artist(frame)


def component_colours(prior: GaussianMixture) -> np.ndarray:
    """Colours (K, 4): components that overlap most have neighbouring hues."""
    groups = merge_components(prior, min(10, prior.num_components)).cpu()
    hues = np.linspace(0, 1, prior.num_components, endpoint=False)[groups.argsort(stable=True).argsort()]
    return colormaps["hsv"](hues)


def draw_curve(ax: Axes, history: list[dict[str, Any]], term: str) -> None:
    """A term of the loss, training and validation, against the epoch; the warm-up is shaded."""
    epochs = [record["epoch"] + 1 for record in history]
    for split, style in (("train", "-"), ("validation", "--")):
        ax.plot(epochs, [record[f"{split}_{term}"] for record in history], style, linewidth=1.2, label=split)
    if warmup := sum(record["stage"] == "warm-up" for record in history):
        ax.axvspan(0.5, warmup + 0.5, color="0.92", label="warm-up (VAE)")
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{term} (nats per image)")
    ax.legend(frameon=False, fontsize=8)


def save_figures(
    directory: Path, model: Autoencoder, data: ImageData, evaluation: Evaluation, history: list[dict[str, Any]]
) -> dict[str, str]:
    """Writes the PNG files of a run and returns {file name: caption}, overview.png aside, which repeats the others.

    Samples are drawn from the prior with torch's generator seeded, so the figures of one model are the same.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shape, prior = data.image_shape, model.prior_mixture().detach()
    codes, prototypes = model.encode(evaluation.test_x).means, model.prototypes()
    codes_xy, means_xy = embed(codes, prior)
    colours, palette = component_colours(prior), colormaps["tab10"](np.arange(data.num_classes) % 10)
    classes = [str(label) for label in range(data.num_classes)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        samples = model.sample(96)
    captions = {}

    def save(name: str, figure: Figure, caption: str) -> None:
        figure.savefig(directory / name, dpi=150)
        captions[name] = caption

    with rc_context(STYLE):
        figure = Figure((11, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        draw_images(left, samples[:60], shape, 10)
        draw_prototypes(middle, model, shape)
        draw_codes(right, codes_xy, data.test.labels, palette, classes)
        for ax, title in ((left, "samples"), (middle, "component prototypes and weights"), (right, "test codes")):
            ax.set_title(title)
        figure.savefig(directory / "overview.png", dpi=150)

        figure = Figure((8, 6), layout="constrained")
        draw_images(figure.subplots(), samples, shape, 12)
        save("samples.png", figure, "Samples: decoded draws from the mixture prior (pixel means).")

        figure = Figure((8, 2.3), layout="constrained")
        ax, rows = figure.subplots(), (data.test.images, evaluation.test_x, model.reconstruct(evaluation.test_x))
        draw_images(ax, torch.cat([row[:14].cpu() for row in rows]), shape, 14)
        for i, name in enumerate(("image", "binarised", "decoded")):
            ax.text(-1, i * (shape[0] + 2) + shape[0] / 2 - 0.5, name, ha="right", va="center")
        save("reconstructions.png", figure, "Reconstructions: test images, the binarised input, its decoded code mean.")

        figure = Figure((8, 5.2), layout="constrained")
        draw_prototypes(figure.subplots(), model, shape)
        save("prototypes.png", figure, "Prototypes: decoded component means with their weights, heaviest first.")

        figure = Figure((11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_codes(left, codes_xy, data.test.labels, palette, classes)
        draw_codes(right, codes_xy, evaluation.clustering.components, colours)
        draw_thumbnails(right, means_xy, prototypes, shape, colours)
        left.set_title("test codes by label")
        right.set_title("test codes by component, prototypes at the component means")
        save("latent.png", figure, "Latent space: a t-SNE map of the test codes; it keeps neighbours, not distances.")

        figure = Figure((11, 3.2), layout="constrained")
        for ax, term in zip(figure.subplots(1, 3), ("loss", "reconstruction", "divergence"), strict=True):
            draw_curve(ax, history, term)
        save("curves.png", figure, "Training curves, per image; the divergence is KL in the warm-up, D_CS after it.")
    return captions


def _weights(mixture: GaussianMixture) -> Tensor:
    if mixture.log_weights is None:
        return mixture.means.new_full((mixture.num_components,), 1 / mixture.num_components)
    return mixture.log_weights.detach().softmax(-1)
