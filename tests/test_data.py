"""Data sets from every source, what is refused, and the batches made of them."""

import gzip
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csdiv.models import Dataset, load_data
from csdiv.models.data import Batches, Split, binarize, mix_seed, read_idx


def numbered(n: int, features: int = 3) -> torch.Tensor:
    """Rows that tell which sample they are."""
    return torch.arange(n, dtype=torch.float32).unsqueeze(-1).expand(n, features)


def splits(data: Dataset) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def sizes(data: Dataset) -> tuple[int, ...]:
    return tuple(len(part.x) for part in splits(data))


def identities(data: Dataset) -> list[list[int]]:
    return [part.x[:, 0].long().tolist() for part in splits(data)]


# from tensors


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(100, 0.1, (70, 10, 20)), (100, 0.0, (80, 0, 20)), (3, 0.1, (2, 0, 1)), (12, 0.7, (1, 8, 3))],
)
def test_dataset_splits_are_disjoint_complete_and_fixed(n: int, fraction: float, expected: tuple[int, ...]) -> None:
    first = Dataset.from_tensors(numbered(n), validation_fraction=fraction)
    torch.manual_seed(5)
    second = Dataset.from_tensors(numbered(n), validation_fraction=fraction)
    assert sizes(first) == expected
    assert sorted(chain(*identities(first))) == list(range(n))
    assert identities(first) == identities(second)
    assert n < 100 or identities(first)[0] != sorted(identities(first)[0])


def test_dataset_refuses_splits_that_leave_none_for_training() -> None:
    with pytest.raises(ValueError, match="got 11, of which 8 for validation and 3 for the test set"):
        Dataset.from_tensors(numbered(11), validation_fraction=0.7)


def test_dataset_keeps_labels_with_their_samples_and_a_given_test_set_whole() -> None:
    names = np.array(["a", "c", "b"])
    data = Dataset.from_tensors(numbered(30), names[np.arange(30) % 3], test=(numbered(4), ["d", "a", "b", "d"]))
    assert data.class_names == ("a", "b", "c", "d")
    assert data.num_classes == 4
    assert sizes(data) == (27, 3, 4)
    for part in (data.train, data.validation):
        assert part.labels is not None
        assert part.labels.dtype == torch.int64
        assert part.labels.tolist() == [(0, 2, 1)[i % 3] for i in part.x[:, 0].long().tolist()]
    assert data.test.x.equal(numbered(4))
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("labels", "names"),
    [([5, -2, 5, 9], ("-2", "5", "9")), (torch.tensor([1.5, 0.5, 1.5, 0.5]), ("0.5", "1.5")), ([True] * 4, ("True",))],
)
def test_dataset_labels_of_any_type(labels: Any, names: tuple[str, ...]) -> None:
    data = Dataset.from_tensors(numbered(4), labels, validation_fraction=0.25)
    assert data.class_names == names
    for part in splits(data):
        assert part.labels is not None
        for row, label in zip(part.x[:, 0].long().tolist(), part.labels.tolist(), strict=True):
            assert names[label] == str(labels[row].item() if isinstance(labels, torch.Tensor) else labels[row])


def test_dataset_without_labels() -> None:
    data = Dataset.from_tensors(numbered(10), test=(numbered(2), None))
    assert data.class_names == ()
    assert data.num_classes == 0
    assert all(part.labels is None for part in splits(data))


@pytest.mark.parametrize(
    ("shape", "sample_shape"),
    [
        ((6, 5), (5,)),
        ((6, 4, 5), (1, 4, 5)),
        ((6, 1, 4, 5), (1, 4, 5)),
        ((6, 3, 4, 5), (3, 4, 5)),
        ((6, 4, 5, 3), (3, 4, 5)),
        ((6, 4, 5, 1), (1, 4, 5)),
    ],
)
def test_dataset_channel_order(shape: tuple[int, ...], sample_shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).random(shape, dtype=np.float32)
    data = Dataset.from_tensors(x, test=(x, None))
    assert data.sample_shape == sample_shape
    assert data.num_features == math.prod(sample_shape)
    assert data.is_image == (len(shape) > 2)
    channels_first = np.moveaxis(x, -1, 1) if shape == (6, 4, 5, 3) else x
    np.testing.assert_array_equal(data.test.x.numpy(), channels_first.reshape(6, -1))


def test_dataset_scales_uint8_images_only() -> None:
    levels = np.arange(3 * 256, dtype=np.uint8).reshape(3, 16, 16)
    images = Dataset.from_tensors(levels, test=(levels, None))
    assert images.test.x.dtype == torch.float32
    torch.testing.assert_close(images.test.x[0], torch.arange(256) / 255, rtol=0, atol=1e-7)
    flat = Dataset.from_tensors(levels.reshape(3, -1), test=(levels.reshape(3, -1), None))
    assert flat.test.x.max() == 255
    wide = Dataset.from_tensors(levels.astype(np.int64), test=(levels.astype(np.int64), None))
    assert wide.test.x.max() == 255


def test_dataset_keeps_no_graph() -> None:
    data = Dataset.from_tensors(torch.rand(5, 2, requires_grad=True))
    assert not any(part.x.requires_grad for part in splits(data))


@pytest.mark.parametrize("odd", ["none", "train", "test"])
def test_dataset_likelihood_suits_every_split(odd: str) -> None:
    x, test = torch.rand(9, 4), torch.rand(2, 4)
    if odd != "none":
        {"train": x, "test": test}[odd][0, 0] = 1.01
    data = Dataset.from_tensors(x, test=(test, None), validation_fraction=0)
    assert data.likelihood == ("bernoulli" if odd == "none" else "gaussian")


@pytest.mark.parametrize("n", [1, 2])
def test_dataset_refuses_too_few_samples(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 3 samples .* got {n}"):
        Dataset.from_tensors(numbered(n))


def test_dataset_with_a_test_set_needs_two_samples() -> None:
    assert sizes(Dataset.from_tensors(numbered(2), test=(numbered(1), None))) == (2, 0, 1)
    with pytest.raises(ValueError, match=r"at least 2 samples .* got 1"):
        Dataset.from_tensors(numbered(1), test=(numbered(1), None))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_dataset_refuses_validation_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"validation_fraction: in \[0, 1\)"):
        Dataset.from_tensors(numbered(50), validation_fraction=fraction)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3), "no samples or no features"),
        (torch.zeros(5, 0), "no samples or no features"),
        (torch.zeros(5), r"\(n, P\).*got torch.float32 \(5,\)"),
        (torch.zeros(2, 2, 2, 2, 2), r"\(n, P\).*got"),
        (torch.zeros(5, 2, dtype=torch.complex64), "real numbers"),
        (torch.zeros(5, 4, 4, 2), r"1 or 3 channels expected, got \(5, 4, 4, 2\)"),
        (np.full((5, 2), "a"), "x: an array of numbers"),
        ([[1.0], [1.0, 2.0]], "x: an array of numbers"),
        (torch.tensor([[0.0], [1.0], [math.nan], [math.inf]]), "x: finite values expected, got nan in sample 2"),
        (torch.tensor([[0.0], [1e39]], dtype=torch.float64), "got inf in sample 1"),
    ],
)
def test_dataset_refuses_samples(x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset.from_tensors(x)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"one for each sample, \(4,\), expected, got \(2,\)"),
        (np.zeros((4, 1)), r"got \(4, 1\)"),
        ([0.0, 1.0, math.nan, 1.0], "labels: finite values"),
        ([0, 1, None, "a"], "labels: values that can be sorted"),
    ],
)
def test_dataset_refuses_labels(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dataset.from_tensors(numbered(4), labels)


def test_dataset_refuses_test_sets_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"test samples of shape \(3,\) expected, got \(2,\)"):
        Dataset.from_tensors(numbered(4), test=(numbered(4, 2), None))
    for labels, test_labels in ((None, [0, 1]), ([0, 1, 0, 1], None)):
        with pytest.raises(ValueError, match="or for neither"):
            Dataset.from_tensors(numbered(4), labels, test=(numbered(2), test_labels))
    with pytest.raises(ValueError, match="x of the test set: finite values expected, got nan in sample 1"):
        Dataset.from_tensors(numbered(4, 1), test=(torch.tensor([[0.0], [math.nan]]), None))


def test_last_samples_can_be_for_validation() -> None:
    x = torch.arange(20.0).view(20, 1)
    data = Dataset.from_tensors(x, test=(x, None), validation_fraction=0.25, validation_split="last")
    assert data.train.x.flatten().tolist() == list(range(15))
    assert data.validation.x.flatten().tolist() == list(range(15, 20))
    alone = Dataset.from_tensors(x, validation_fraction=0.25, validation_split="last")
    assert [len(split.x) for split in (alone.train, alone.validation, alone.test)] == [11, 5, 4]
    assert alone.validation.x.flatten().tolist() == list(range(11, 16))


# the embedded digits


def test_load_data_digits() -> None:
    data = load_data("digits", validation_fraction=0.2)
    assert data.name == "digits"
    assert data.sample_shape == (1, 8, 8)
    assert data.class_names == tuple("0123456789")
    assert sizes(data) == (1078, 359, 360)
    assert data.likelihood == "bernoulli"
    assert data.train.x.max() == 1
    assert data.train.labels is not None
    mean_of_zero = data.train.x[data.train.labels == 0].mean(0).view(8, 8)
    assert mean_of_zero[3:5, 3:5].max() < 0.3 < mean_of_zero[3:5, 2].min()  # a ring


# IDX folders


def write_idx(path: Path, values: np.ndarray) -> None:
    content = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 5), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 3


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("with_test", [True, False])
def test_load_data_idx(tmp_path: Path, suffix: str, separator: str, with_labels: bool, with_test: bool) -> None:
    parts = {"train": slice(0, 16), "t10k": slice(16, 20)} if with_test else {"train": slice(0, 20)}
    for part, rows in parts.items():
        write_idx(tmp_path / f"{part}-images{separator}idx3-ubyte{suffix}", IMAGES[rows])
        if with_labels:
            write_idx(tmp_path / f"{part}-labels{separator}idx1-ubyte{suffix}", LABELS[rows])
    data = load_data(tmp_path, validation_fraction=0)
    assert data.name == tmp_path.name
    assert data.sample_shape == (1, 4, 5)
    assert sizes(data) == (16, 0, 4)
    assert data.class_names == (("0", "1", "2") if with_labels else ())
    levels = {tuple((row / 255).tolist()): int(label) for row, label in zip(as_rows(IMAGES), LABELS, strict=True)}
    for part in splits(data):
        assert (part.labels is not None) == with_labels
        expected = [levels[tuple(row.tolist())] for row in part.x]
        assert part.labels is None or part.labels.tolist() == expected
    if with_test:
        torch.testing.assert_close(data.test.x, as_rows(IMAGES[16:]) / 255)


def as_rows(images: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(images, dtype=torch.float32).flatten(1)


def test_read_idx_of_every_number_of_dimensions(tmp_path: Path) -> None:
    for shape in ((7,), (3, 2), (2, 3, 4), (2, 3, 4, 3)):
        values = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
        write_idx(tmp_path / "values", values)
        np.testing.assert_array_equal(read_idx(tmp_path / "values"), values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "not an IDX file"),
        (lambda content: content[:9], "not an IDX file"),
        (lambda content: b"\x00\x00\x0d" + content[3:], "not an IDX file of unsigned bytes"),
        (lambda content: content[:-1], "has 399 values instead of 400: truncated"),
        (lambda content: content + b"\x00", "has 401 values instead of 400"),
        (lambda content: struct.pack(">4I", 0x803, 0, 4, 5), "no samples"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_load_data_refuses_malformed_idx(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str, suffix: str
) -> None:
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    write_idx(tmp_path / "plain", IMAGES)
    content = damage((tmp_path / "plain").read_bytes())
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        load_data(tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:30] + b"\xff" * 9 + b[39:]])
def test_read_idx_names_a_malformed_gzip_file(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, IMAGES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name} is not a complete gzip file"):
        read_idx(path)


def test_load_data_refuses_idx_parts_that_do_not_fit(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS[:-1])
    with pytest.raises(ValueError, match=r"labels: one for each sample, \(20,\), expected, got \(19,\)"):
        load_data(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", IMAGES)
    with pytest.raises(ValueError, match="or for neither"):
        load_data(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", IMAGES[:, :3])
    with pytest.raises(ValueError, match=r"test samples of shape \(1, 4, 5\) expected, got \(1, 3, 5\)"):
        load_data(tmp_path)


# image folders


def write_image(path: Path, values: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("PIL.Image").fromarray(values).save(path, **options)


def test_load_data_image_folder_with_classes(tmp_path: Path) -> None:
    for i in range(12):
        write_image(tmp_path / ("cat", "dog", "ant")[i % 3] / f"{i}.png", np.full((5, 4), 20 * i, np.uint8))
    (tmp_path / "readme.txt").write_text("no image")
    data = load_data(tmp_path)
    assert data.sample_shape == (1, 5, 4)
    assert data.class_names == ("ant", "cat", "dog")
    assert sum(sizes(data)) == 12
    for part in splits(data):
        assert part.labels is not None
        assert part.labels.tolist() == [(1, 2, 0)[i % 3] for i in (part.x[:, 0] * 255 / 20).round().long().tolist()]


@pytest.mark.parametrize("height", [1, 3, 5])
def test_load_data_image_folder_without_classes(tmp_path: Path, height: int) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, height, 4, 3), dtype=np.uint8)
    colours[:, 0, 0, 0] = 40 * np.arange(6)
    for i, values in enumerate(colours):
        write_image(tmp_path / f"{i}.PNG", values)
    data = load_data(tmp_path)
    assert data.sample_shape == (3, height, 4)
    assert data.num_classes == 0
    x = torch.cat([part.x for part in splits(data)])
    expected = torch.as_tensor(colours).movedim(-1, 1).flatten(1) / 255
    torch.testing.assert_close(x[x[:, 0].argsort()], expected)


def test_load_data_image_modes(tmp_path: Path) -> None:
    """One gray level, however it is stored."""
    modes = ("L", "LA", "RGB", "RGBA", "P", "1")
    for mode in modes:
        for i in range(3):
            image = pytest.importorskip("PIL.Image").fromarray(np.full((4, 4), 255, np.uint8)).convert(mode)
            (tmp_path / mode).mkdir(exist_ok=True)
            image.save(tmp_path / mode / f"{i}.png")
        data = load_data(tmp_path / mode)
        assert data.sample_shape == (1 if mode in ("L", "LA", "1") else 3, 4, 4), mode
        assert data.train.x.unique().tolist() == [1.0], mode


def test_load_data_keeps_the_range_of_16_bit_images(tmp_path: Path) -> None:
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for i in range(3):
        write_image(tmp_path / f"{i}.png", levels)
    torch.testing.assert_close(load_data(tmp_path).train.x[0], torch.arange(256) / 255)


def test_load_data_refuses_32_bit_images(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.tif", np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"0\.tif is not a readable image: 8 or 16 bits .* got TIFF of 32"):
        load_data(tmp_path)


def test_load_data_refuses_image_folders(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: no IDX files .* and no images"):
        load_data(tmp_path)
    for i in range(4):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", np.zeros((5, 4), np.uint8))
    write_image(tmp_path / "b" / "9.png", np.zeros((5, 6), np.uint8))
    with pytest.raises(ValueError, match=r"got \(4, 5\) in a/0\.png and \(6, 5\) in b/9\.png"):
        load_data(tmp_path)
    write_image(tmp_path / "b" / "9.png", np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"one size and mode expected, .* b/9\.png"):
        load_data(tmp_path)
    (tmp_path / "b" / "9.png").unlink()
    write_image(tmp_path / "flat.png", np.zeros((5, 4), np.uint8))
    with pytest.raises(ValueError, match="got both"):
        load_data(tmp_path)


def test_load_data_names_unreadable_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    for i in range(4):
        write_image(tmp_path / "ab"[i % 2] / f"{i}.png", noise)
    path = tmp_path / "b" / "1.png"
    content = path.read_bytes()
    second_chunk = content[:33] + b"\x00\x00\x00\x04\xc2\xe4\x87\x01" + content[33:]
    for damaged in (b"", b"no image", content[: len(content) // 2], second_chunk):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b/1\.png is not a readable image"):
            load_data(tmp_path)


# arrays in files


def save(path: Path, **arrays: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.as_tensor(value) for name, value in arrays.items()}, path)
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".npz", ".pt"])


@SUFFIXES
@pytest.mark.parametrize(("x_name", "label_name"), [("x", "labels"), ("images", "y"), ("data", "targets")])
def test_load_data_arrays(tmp_path: Path, suffix: str, x_name: str, label_name: str) -> None:
    path = save(
        tmp_path / f"some{suffix}", **{x_name: numbered(20), label_name: np.arange(20) % 2, "other": np.ones(3)}
    )
    data = load_data(path)
    assert data.name == "some"
    assert data.sample_shape == (3,)
    assert data.class_names == ("0", "1")
    assert data.likelihood == "gaussian"
    assert sizes(data) == (14, 2, 4)
    assert sorted(chain(*identities(data))) == list(range(20))
    for part in splits(data):
        assert part.labels is not None
        assert part.labels.equal(part.x[:, 0].long() % 2)


@SUFFIXES
def test_load_data_arrays_with_a_test_set(tmp_path: Path, suffix: str) -> None:
    arrays = {"x": numbered(20), "labels": np.arange(20) % 2, "test_x": numbered(5), "test_labels": np.arange(5) % 2}
    data = load_data(str(save(tmp_path / f"some{suffix}", **arrays)))
    assert sizes(data) == (18, 2, 5)
    assert data.test.x.equal(numbered(5))
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0]
    unlabelled = load_data(save(tmp_path / f"other{suffix}", x=numbered(20), test_x=numbered(5)))
    assert sizes(unlabelled) == (18, 2, 5)
    assert unlabelled.num_classes == 0


def test_load_data_single_arrays_and_string_labels(tmp_path: Path) -> None:
    torch.save(torch.arange(80, dtype=torch.uint8).view(5, 4, 4), tmp_path / "x.pt")
    data = load_data(tmp_path / "x.pt")
    assert data.sample_shape == (1, 4, 4)
    assert data.likelihood == "bernoulli"
    torch.save({"x": numbered(4), "y": ["b", "a", "b", "a"]}, tmp_path / "named.pt")
    assert load_data(tmp_path / "named.pt").class_names == ("a", "b")
    np.savez(tmp_path / "x.npz", numbered(5))
    assert load_data(tmp_path / "x.npz").num_features == 3
    np.savez(tmp_path / "named.npz", x=numbered(4), labels=np.array(["b", "a", "b", "a"]))
    assert load_data(tmp_path / "named.npz").class_names == ("a", "b")


@SUFFIXES
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": numbered(5)}, "an array named x or .* expected, got z"),
        ({"x": numbered(5), "y": np.arange(4)}, r"labels: one for each sample, \(5,\), expected, got \(4,\)"),
        ({"x": numbered(5), "y": np.full(5, np.nan)}, "labels: finite values"),
        ({"x": np.where(numbered(5) == 3, np.nan, 1.0)}, "x: finite values expected, got nan in sample 3"),
        ({"x": np.zeros((0, 3))}, "x: no samples"),
        ({"x": numbered(2)}, "at least 3 samples"),
        ({"x": numbered(5), "y": np.arange(5), "test_x": numbered(2)}, "labels expected for both"),
        ({"x": numbered(5), "test_x": numbered(2, 4)}, "test samples of shape"),
    ],
)
def test_load_data_refuses_arrays(tmp_path: Path, suffix: str, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path / f"some{suffix}", **arrays)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {message}"):
        load_data(path)


@pytest.mark.parametrize("content", [[1.0, 2.0], {}, {1: numbered(5)}, {"x": "text"}, {"x": [[1], [1, 2]]}, None])
def test_load_data_refuses_pt_files_of_other_things(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: (x: )?an array"):
        load_data(tmp_path / "other.pt")


def test_load_data_refuses_npz_files_of_other_things(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", x=np.full((5, 2), "a"))
    with pytest.raises(ValueError, match=r"text\.npz: x: an array of numbers expected"):
        load_data(tmp_path / "text.npz")
    np.save(tmp_path / "x.npy", numbered(5))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz: not an \.npz archive"):
        load_data(tmp_path / "x.npz")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@SUFFIXES
def test_load_data_refuses_damaged_files(tmp_path: Path, suffix: str) -> None:
    content = save(tmp_path / f"whole{suffix}", x=numbered(50), labels=np.arange(50) % 2).read_bytes()
    middle = len(content) // 2
    middle_lost = content[: middle - 100] + bytes(200) + content[middle + 100 :]
    cut = [content[:n] for n in (0, 1, 10, 100, middle, len(content) - 1)]
    path = tmp_path / f"damaged{suffix}"
    for damaged in (*cut, b"no archive at all", b"\x80\x05garbage", *([middle_lost] if suffix == ".npz" else [])):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_data(path)


def test_load_data_refuses_damaged_pt_files_of_the_older_format(tmp_path: Path) -> None:
    torch.save({"x": numbered(50)}, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    content, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "damaged.pt"
    for end in range(300):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"damaged\.pt: truncated, or not a file of plain tensors"):
            load_data(path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["npz", "npz labels", "npz raw", "pt", "pt raw", "pt older"])
def test_load_data_executes_nothing(tmp_path: Path, kind: str) -> None:
    trap, path = tmp_path / "executed", tmp_path / f"data.{kind.split()[0]}"
    malicious = np.array([Malicious(trap)] * 5, dtype=object)
    if kind == "npz":
        np.savez(path, x=malicious)
    elif kind == "npz labels":
        np.savez(path, x=numbered(5), labels=malicious)
    elif kind == "pt":
        torch.save({"x": numbered(5), "labels": Malicious(trap)}, path)
    elif kind == "pt older":
        torch.save({"x": numbered(5), "y": Malicious(trap)}, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Malicious(trap)))
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_data(path)
    assert not trap.exists()


def test_malicious_is_malicious(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_load_data_leaves_other_objects_of_an_npz_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=numbered(5), notes=np.array([Malicious(tmp_path / "executed")], dtype=object))
    assert sum(sizes(load_data(tmp_path / "data.npz"))) == 5
    assert not (tmp_path / "executed").exists()


def test_load_data_refuses_npz_members_that_are_no_arrays(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, numbered(5).numpy())
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue()[:-20])
    with pytest.raises(ValueError, match=r"data\.npz: "):
        load_data(tmp_path / "data.npz")
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x", b"text")
    with pytest.raises(ValueError, match=r"data\.npz: x: "):
        load_data(tmp_path / "data.npz")


def test_load_data_refuses_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'digits', a folder, .* there is no .*mnist"):
        load_data(tmp_path / "mnist")
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"data\.csv: 'digits', a folder, an \.npz or a \.pt file expected"):
        load_data(tmp_path / "data.csv")


# batches


@pytest.mark.parametrize(("n", "batch_size"), [(20, 6), (18, 6), (5, 6), (1, 1)])
def test_batches_are_the_rows_in_a_new_order_for_each_epoch(n: int, batch_size: int) -> None:
    batches = Batches(numbered(n), batch_size, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        parts = list(batches)
        assert [len(part) for part in parts] == [min(batch_size, n - i) for i in range(0, n, batch_size)]
        assert len(batches) == len(parts)
        orders.append(torch.cat(parts)[:, 0].tolist())
        assert sorted(orders[-1]) == list(range(n))
    assert orders[0] == orders[2]
    assert n < 5 or orders[0] != orders[1]
    batches.seed = 4
    assert n < 5 or torch.cat(list(batches))[:, 0].tolist() != orders[0]


def test_batches_without_a_seed_keep_the_order() -> None:
    batches = Batches(numbered(7), 3)
    batches.set_epoch(2)
    assert torch.cat(list(batches)).equal(numbered(7))


def test_batches_do_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    list(Batches(numbered(7), 3, seed=0))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 12, 24, 25, 26, 27, 35])
@pytest.mark.parametrize("seed", [None, 0])
def test_batches_are_dealt_out_evenly(world_size: int, n: int, seed: int | None) -> None:
    whole = list(Batches(numbered(n), 12, seed))
    ranks = [Batches(numbered(n), 12, seed, rank, world_size) for rank in range(world_size)]
    dealt = [list(rank) for rank in ranks]
    assert {len(rank) for rank in ranks} == {len(parts) for parts in dealt} == {len(dealt[0])}
    assert len(dealt[0]) == sum(len(batch) >= world_size for batch in whole)
    for batch, *parts in zip(whole, *dealt, strict=False):
        assert {len(part) for part in parts} == {len(batch) // world_size}
        together = sorted(torch.cat(parts)[:, 0].tolist())
        assert len(set(together)) == len(together)
        assert set(together) <= set(batch[:, 0].tolist())
        assert len(batch) % world_size or together == sorted(batch[:, 0].tolist())


@pytest.mark.parametrize(("batch_size", "rank", "world_size"), [(2, 0, 3), (0, 0, 1), (8, 2, 2), (8, -1, 2)])
def test_batches_refuse(batch_size: int, rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="0 <= rank < world_size <= batch_size"):
        Batches(numbered(9), batch_size, 0, rank, world_size)


def test_binarize_draws_gray_levels_as_probabilities() -> None:
    x = torch.tensor([0.0, 0.25, 1.0]).expand(40_000, 3)
    drawn = binarize(x, 1)
    assert drawn.unique().tolist() == [0.0, 1.0]
    assert drawn.mean(0)[[0, 2]].tolist() == [0.0, 1.0]
    assert drawn[:, 1].mean().item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))
    torch.manual_seed(7)
    assert binarize(x, 1).equal(drawn)
    assert not binarize(x, 2).equal(drawn)
    assert binarize(x[:0], 1).shape == (0, 3)


def test_mix_seed_differs_between_sequences() -> None:
    assert mix_seed(3, 4) == mix_seed(3, 4)
    sequences = [(a,) for a in range(50)] + [(a, b) for a in range(50) for b in range(50)]
    sequences += [(a, b, 0) for a in range(50) for b in range(50)] + [(2**32,), (2**32, 0)]
    seeds = {mix_seed(*numbers) for numbers in sequences}
    assert len(seeds) == len(sequences)
    assert all(0 <= seed < 2**63 for seed in seeds)
