"""Data sets as tensors, split once and for all: embedded digits, IDX folders, image folders, .npz, .pt, tensors."""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csdiv.models.readers import NpzArrays, check_memory, printable, read_idx, read_images, read_tensors

SAMPLE_KEYS = ("x", "images", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "targets", "identity")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
TEST_FRACTION = 0.2  # of data that has no test set of its own


@dataclass(frozen=True)
class Split:
    """x: (n, P) float32; labels: (n,) int64 in 0 … C − 1, None without labels."""

    x: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Dataset:
    """Samples of one shape in three disjoint splits.

    Attributes:
        name: for titles.
        sample_shape: (C, H, W) of images, gray levels in [0, 1]; (P,) of other samples.
        class_names: what the labels 0 … C − 1 are called; empty without labels.
        train, validation, test: validation may be empty.
    """

    name: str
    sample_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    @property
    def num_features(self) -> int:
        """P, the product of ``sample_shape``."""
        return math.prod(self.sample_shape)

    @property
    def num_classes(self) -> int:
        """C; 0 without labels."""
        return len(self.class_names)

    @property
    def is_image(self) -> bool:
        return len(self.sample_shape) == 3

    @property
    def likelihood(self) -> str:
        """The likelihood that suits the values: "bernoulli" for [0, 1], else "gaussian"."""
        parts = (self.train.x, self.validation.x, self.test.x)
        return "bernoulli" if all(((x >= 0) & (x <= 1)).all() for x in parts) else "gaussian"

    @classmethod
    def from_tensors(
        cls,
        x: Any,
        labels: Any = None,
        *,
        test: tuple[Any, Any] | None = None,
        name: str = "data",
        validation_fraction: float = 0.1,
        validation_split: str = "random",
    ) -> Dataset:
        """Splits samples, in the same way for every seed.

        Args:
            x: (n, P) numbers, or images (n, H, W), (n, H, W, C) or (n, C, H, W) with C = 1 or 3; uint8 images are gray
                levels of 255, others are taken as they are.
            labels: (n,) of any type that can be sorted, or None.
            test: samples and labels of a test set; without, a fifth of the samples becomes one.
            validation_fraction: of all samples of x, in [0, 1); 0 for none.
            validation_split: "random", or "last": the order is kept, and the last samples are for validation (where
                there is no test set, those before the last fifth).

        Raises:
            ValueError: shapes that do not fit, values that are not finite, too few samples to split: three, or two
                beside a test set.
        """
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction: in [0, 1) expected, got {validation_fraction}")
        samples, shape = _samples(x, "x")
        parts = [samples]
        if test is not None:
            test_samples, test_shape = _samples(test[0], "x of the test set")
            if test_shape != shape:
                raise ValueError(f"test samples of shape {shape} expected, got {test_shape}")
            parts.append(test_samples)
            if (labels is None) != (test[1] is None):
                raise ValueError("labels expected for both training and test samples, or for neither")
        codes, names = _labels(
            [] if labels is None else [labels, test[1]] if test is not None else [labels], [len(part) for part in parts]
        )
        n = len(samples)
        num_test = 0 if test is not None else math.ceil(TEST_FRACTION * n)
        num_validation = round(validation_fraction * n)
        num_train, least = n - num_test - num_validation, 3 if test is None else 2
        if n < least or num_train < 1:
            raise ValueError(
                f"at least {least} samples expected, and one or more of them for training, got {n}, of which "
                f"{num_validation} for validation and {num_test} for the test set"
            )
        if validation_split == "last":
            order = torch.arange(n)
        else:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        rows = order.split([num_train, num_validation, num_test])
        train, validation, held_out = (Split(samples[r], codes[0][r] if codes else None) for r in rows)
        if test is not None:
            held_out = Split(parts[1], codes[1] if codes else None)
        return cls(name, shape, names, train, validation, held_out)


def load_data(source: str | Path, *, validation_fraction: float = 0.1, validation_split: str = "random") -> Dataset:
    """A data set by its name or place.

    Args:
        source: "digits", scikit-learn's 1797 embedded images of 8 x 8 pixels; a folder with MNIST-format IDX files
            (train-images-idx3-ubyte and so on, gzipped or not); a folder of images of one size, in one subfolder per
            class or without classes; an .npz or .pt file with an array ``x`` and, if there are labels, ``labels``, for
            a test set ``test_x`` and ``test_labels``. Nothing is unpickled.
        validation_fraction, validation_split: see :meth:`Dataset.from_tensors`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a malformed file, values that are not finite, too few samples; names the file.
    """
    if source == "digits":
        return load_digits(validation_fraction, validation_split)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"data: 'digits', a folder, an .npz or a .pt file expected; there is no {path}")
    options = {
        "name": printable(path.stem or path.resolve().stem),
        "validation_fraction": validation_fraction,
        "validation_split": validation_split,
    }
    try:
        if path.is_dir():
            if _idx_file(path, "train-images") is not None:
                return _load_idx(path, options)
            return _load_image_folder(path, options)
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("not an .npz archive: truncated?")
            return _load_arrays(NpzArrays(path), options)
        if path.suffix == ".pt":
            return _load_arrays(read_tensors(path), options)
    except (ValueError, EOFError, OSError, RuntimeError, zlib.error, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: 'digits', a folder, an .npz or a .pt file expected")


def load_digits(validation_fraction: float = 0.1, validation_split: str = "random") -> Dataset:
    """scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, embedded in that package."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16.0
    return Dataset.from_tensors(
        x, labels, name="digits", validation_fraction=validation_fraction, validation_split=validation_split
    )


def binarize(x: Tensor, seed: int) -> Tensor:
    """Pixels drawn once from Bernoulli(gray level): (n, P) in [0, 1] -> (n, P) in {0, 1}, fixed by the seed."""
    return torch.bernoulli(x.cpu(), generator=torch.Generator().manual_seed(seed)).to(x.device)


class Batches:
    """Batches of the rows of a tensor, in a new order for each pass: a loader without workers or collation.

    Args:
        rows: (n, P).
        batch_size: rows in a batch; the last may have fewer.
        seed: of the orders, with the pass's number: :meth:`set_epoch`. None keeps the given order.
        rank, world_size: with more than one process, each batch is dealt out, and as many rows to each: of a batch of
            another size than a multiple of world_size, the rows that are too many are left out.

    Raises:
        ValueError: fewer rows in a batch than processes.
    """

    def __init__(
        self, rows: Tensor, batch_size: int, seed: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(
                f"0 <= rank < world_size <= batch_size expected, got rank {rank}, world_size {world_size} and "
                f"batch_size {batch_size}"
            )
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.epoch = rank, world_size, 0

    def set_epoch(self, epoch: int) -> None:
        """The number of the pass that comes."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.rows)
        return n // self.batch_size + (n % self.batch_size >= self.world_size)

    def __iter__(self) -> Iterator[Tensor]:
        n = len(self.rows)
        order = torch.arange(n)
        if self.seed is not None:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(self.seed, self.epoch)))
        for index in order.split(self.batch_size)[: len(self)]:
            even = len(index) - len(index) % self.world_size
            yield self.rows[index[self.rank : even : self.world_size]]


def mix_seed(*numbers: int) -> int:
    """One seed, different for different sequences of numbers."""
    # Not np.random.SeedSequence, which pads with zeros: (5,) and (5, 0) would give the same.
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _samples(x: Any, name: str) -> tuple[Tensor, tuple[int, ...]]:
    """(n, P) float32 and the shape of a sample."""
    try:
        x = torch.as_tensor(x).detach()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: an array of numbers expected: {error}") from error
    gray_levels = x.dtype == torch.uint8 and x.ndim > 2
    if x.is_complex() or x.ndim not in (2, 3, 4):
        raise ValueError(
            f"{name}: real numbers (n, P), (n, H, W), (n, H, W, C) or (n, C, H, W) expected, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    if x.ndim == 4 and x.shape[1] not in (1, 3):
        x = x.movedim(-1, 1)
    if x.ndim == 4 and x.shape[1] not in (1, 3):
        raise ValueError(f"{name}: images with 1 or 3 channels expected, got {tuple(x.movedim(1, -1).shape)}")
    shape = tuple(x.shape[1:]) if x.ndim != 3 else (1, *x.shape[1:])
    if 0 in x.shape:
        raise ValueError(f"{name}: no samples or no features, got {tuple(x.shape)}")
    check_memory(4.0 * x.numel(), f"{name}: {tuple(x.shape)} in float32")
    x = x.reshape(len(x), -1).to(torch.float32)
    finite = x.isfinite().all(-1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"{name}: finite values expected, got {x[row][~x[row].isfinite()][0].item()} in sample {row}")
    return x / 255.0 if gray_levels else x, shape


def _labels(labels: list[Any], sizes: list[int]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Labels 0 … C − 1 of each set, and the names of the classes of all sets."""
    if not labels:
        return [], ()
    arrays = [np.asarray(values) for values in labels]
    for values, size in zip(arrays, sizes, strict=True):
        if values.shape != (size,):
            raise ValueError(f"labels: one for each sample, ({size},), expected, got {values.shape}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError("labels: finite values expected, got NaN or infinity")
    try:
        names, codes = np.unique(np.concatenate(arrays), return_inverse=True)
    except TypeError as error:
        raise ValueError(f"labels: values that can be sorted expected: {error}") from error
    texts = tuple(str(name).encode("utf-8", "backslashreplace").decode() for name in names)
    return list(torch.as_tensor(codes, dtype=torch.int64).split(sizes)), texts


def _load_arrays(arrays: Any, options: Mapping[str, Any]) -> Dataset:
    """Of a file with named arrays, or with a single one."""
    if isinstance(arrays, torch.Tensor):
        arrays = {"x": arrays}
    if not isinstance(arrays, Mapping):
        raise ValueError(f"an array or named arrays expected, got {type(arrays).__name__}")

    def find(names: tuple[str, ...], prefix: str = "") -> Any:
        return next((arrays[prefix + name] for name in names if prefix + name in arrays), None)

    x, test_x = find(SAMPLE_KEYS), find(SAMPLE_KEYS, "test_")
    if x is None:
        raise ValueError(
            f"an array named {' or '.join(SAMPLE_KEYS)} expected, got {', '.join(map(str, arrays)) or 'none'}"
        )
    test = None if test_x is None else (test_x, find(LABEL_KEYS, "test_"))
    return Dataset.from_tensors(x, find(LABEL_KEYS), test=test, **options)


def _idx_file(folder: Path, stem: str) -> Path | None:
    """<stem>-idx3-ubyte or <stem>.idx3-ubyte, gzipped or not."""
    return next(iter(sorted(folder.glob(f"{stem}[-.]idx?-ubyte*"))), None)


def _load_idx(folder: Path, options: Mapping[str, Any]) -> Dataset:
    def read(part: str) -> tuple[Any, Any] | None:
        images, labels = _idx_file(folder, f"{part}-images"), _idx_file(folder, f"{part}-labels")
        return (read_idx(images), read_idx(labels) if labels else None) if images else None

    x, labels = read("train") or (None, None)
    return Dataset.from_tensors(x, labels, test=read("t10k"), **options)


def _load_image_folder(folder: Path, options: Mapping[str, Any]) -> Dataset:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError("no IDX files (train-images-idx3-ubyte) and no images in it")
    parents = {path.parent for path in paths}
    if len(parents) > 1 and folder in parents:
        raise ValueError("images in subfolders, one for each class, or all in the folder itself expected, got both")
    x = read_images(folder, paths)
    names = [printable(path.parent.relative_to(folder).as_posix()) for path in paths]
    classes = names if len(parents) > 1 else None
    return Dataset.from_tensors(np.moveaxis(x, -1, 1) if x.ndim == 4 else x, classes, **options)
