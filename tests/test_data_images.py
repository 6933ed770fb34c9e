"""Data sets from folders of IDX files and of images."""

import gzip
import math
import os
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_splits import sizes, splits

from csdiv.models import load_data
from csdiv.models.readers import read_idx

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
        (lambda content: content + b"\x00", "has more values than the 400 of its header"),
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


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ((2**32 - 1,) * 4, b"", "cannot have the"),
        ((2**32 - 1,) * 255, b"", "cannot have the"),
        ((10**9, 10**4), bytes(1 << 20), "cannot have the"),
        ((100, 10**6), bytes(1 << 20), "has 1048576 values instead of 100000000: truncated"),
        ((20, 4, 5), bytes(1 << 26), "has more values than the 400 of its header"),
    ],
)
def test_read_idx_takes_no_memory_for_a_header_that_disagrees(
    shape: tuple[int, ...], content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + content, 9))
    if message.endswith("truncated"):  # a real archive of zeros that large is a thousandth of it
        path.write_bytes(path.read_bytes() + gzip.compress(b"", 0) * 6000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 48 << 20
    tracemalloc.stop()


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


@pytest.mark.parametrize(("top", "bits"), [(1, 8), (255, 8), (256, 10), (4095, 12), (9999, 14), (65535, 16)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_load_data_keeps_the_range_of_16_bit_images(top: int, bits: int, suffix: str, tmp_path: Path) -> None:
    """Exactly, and none of them dark because it uses fewer bits than the file has room for."""
    levels = (np.arange(256).reshape(16, 16) * top // 255).astype(np.uint16)
    for i in range(3):
        write_image(tmp_path / f"{i}.{suffix}", levels if i else np.minimum(levels, top // 2))
    expected = torch.as_tensor(levels.reshape(-1) / (2**bits - 1), dtype=torch.float32)
    data = load_data(tmp_path)
    assert data.likelihood == "bernoulli"
    brightest = max((x for part in splits(data) for x in part.x), key=lambda x: x.sum().item())
    assert brightest.equal(expected)


def test_load_data_mixes_images_of_8_and_16_bits(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"{i}.png", np.full((4, 4), *((51, np.uint8), (13107, np.uint16))[i % 2]))
    write_image(tmp_path / "3.png", np.full((4, 4), 65535, np.uint16))
    levels = torch.cat([part.x for part in splits(load_data(tmp_path))]).unique()
    torch.testing.assert_close(levels, torch.tensor([0.2, 1.0]))


def write_deep_png(path: Path, values: np.ndarray) -> None:
    """A PNG file of (H, W, C) levels of 16 bits, which Pillow does not write: gray with alpha, colour, with alpha."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    content = b"\x89PNG\r\n\x1a\n"
    head = struct.pack(">2I5B", width, height, 16, kind, 0, 0, 0)
    for name, chunk in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", zlib.crc32(name + chunk))
    path.write_bytes(content)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_load_data_refuses_colours_of_16_bits_that_would_be_black(channels: int, tmp_path: Path) -> None:
    for top, message in ((4095, "use 14 or fewer"), (255, "use 14 or fewer"), (65535, None)):
        for i in range(3):
            write_deep_png(tmp_path / f"{i}.png", np.full((4, 4, channels), top, np.uint16))
        if message:
            with pytest.raises(ValueError, match=message):
                load_data(tmp_path)
        else:
            assert load_data(tmp_path).train.x.unique().tolist() == [1.0]


def test_load_data_refuses_an_image_that_claims_to_be_huge(tmp_path: Path) -> None:
    for i in range(3):
        write_deep_png(tmp_path / f"{i}.png", np.zeros((4, 4, 1), np.uint16))
    path = tmp_path / "0.png"
    content = path.read_bytes()
    for size in ((2**31 - 1, 2**31 - 1), (100_000, 10_000), (10_000, 10_000)):
        head = b"IHDR" + struct.pack(">2I", *size) + content[24:29]
        path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
        with pytest.raises(ValueError, match=r"0\.png is not a readable image"):
            load_data(tmp_path)


@pytest.mark.parametrize("name", ["😀", "caf\u00e9", os.fsdecode(b"caf\xe9"), "a\nb"])
def test_load_data_images_in_folders_of_any_name(name: str, tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / "data" / (name, "other")[i % 2] / f"{name}{i}.png", np.full((4, 4), i, np.uint8))
    expected = {"other", name.replace("\udce9", "\\xe9")}
    assert set(load_data(tmp_path / "data").class_names) == expected
    write_image(tmp_path / "data" / name / "0.png", np.zeros((4, 5), np.uint8))
    with pytest.raises(ValueError, match="images of one size"):
        load_data(tmp_path / "data")


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
