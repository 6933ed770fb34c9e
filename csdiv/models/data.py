"""Image data sets as tensors, split once and for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """images: (n, P) float32 gray levels in [0, 1]; labels: (n,) int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageData:
    """A data set of images of one shape, in three disjoint splits."""

    name: str
    image_shape: tuple[int, int]
    num_classes: int
    train: Split
    validation: Split
    test: Split


def load_digits() -> ImageData:
    """scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, embedded in that package.

    Gray levels 0..16 become [0, 1]. The split into 1257 training, 180 validation and 360 test images is the same for
    every seed.
    """
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.as_tensor(images, dtype=torch.float32) / 16.0, torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, validation, test = (Split(x[rows], y[rows]) for rows in order.split([1257, 180, 360]))
    return ImageData("digits", (8, 8), 10, train, validation, test)


def binarize(images: Tensor, seed: int) -> Tensor:
    """Pixels drawn once from Bernoulli(gray level): (n, P) in [0, 1] -> (n, P) in {0, 1}, fixed by the seed."""
    return torch.bernoulli(images.cpu(), generator=torch.Generator().manual_seed(seed)).to(images.device)
