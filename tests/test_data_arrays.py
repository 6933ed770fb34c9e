"""Data sets from .npz and .pt files, of which nothing is executed."""

import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_splits import identities, numbered, sizes, splits

from csdiv.models import load_data

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


# headers that claim too much


def npy(shape: tuple[int, ...], dtype: str = "<f4", content: bytes = b"", version: int = 1) -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + content


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["x", "labels", "test_x"])
@pytest.mark.parametrize(
    "member",
    [
        npy((10**13,)),
        npy((10**13, 3), version=2),
        npy((5, 10**7), content=bytes(400)),
        npy((2**62, 2**62)),
        npy((-1, 3), content=bytes(12)),
        npy((5,), "<U200000000", content=bytes(40)),
        npy((5, 3), content=bytes(61)),
        npy((5, 3), content=bytes(59)),
        npy((5, 3), content=bytes(60), version=3),
        npy((5, 3), "[" * 5000),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ],
    ids=lambda member: str(member[8:90]),
)
def test_load_data_refuses_npz_headers_that_claim_too_much(
    member: bytes, name: str, compression: int, tmp_path: Path
) -> None:
    np.savez(tmp_path / "own.npz", **{n: numbered(5) for n in ("x", "test_x") if n != name})
    with zipfile.ZipFile(tmp_path / "own.npz", "a", compression) as archive:
        archive.writestr(f"{name}.npy", member)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"own\.npz: {name}: an array expected: "):
        load_data(tmp_path / "own.npz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_load_data_refuses_archives_whose_directory_claims_too_much(suffix: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"own{suffix}", x=numbered(50))
    good = path.read_bytes()
    place, entries = good.find(b"PK\x01\x02"), 0
    while place >= 0:
        for offset in (20, 24):  # sizes in the archive and outside
            changed = good[: place + offset] + struct.pack("<I", 2**32 - 2) + good[place + offset + 4 :]
            path.write_bytes(changed)
            name = good[place + 46 : place + 46 + good[place + 28]].decode()
            if suffix == ".pt" or name == "x.npy":
                with pytest.raises(ValueError, match=r"cannot have the|not a file of plain tensors|an array expected"):
                    load_data(path)
        place, entries = good.find(b"PK\x01\x02", place + 1), entries + 1
    assert entries > 0


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "pt"])
def test_load_data_refuses_arrays_of_which_a_bit_has_changed(kind: str, tmp_path: Path) -> None:
    path, generator = tmp_path / f"own.{kind.split()[0]}", np.random.default_rng(0)
    x = torch.as_tensor(generator.random((60, 5)), dtype=torch.float32)
    if kind == "pt":
        torch.save({"x": x}, path)
    else:
        (np.savez_compressed if "compressed" in kind else np.savez)(path, x=x)
    good, expected, refused = path.read_bytes(), load_data(path), 0
    for place in generator.choice(len(good), 150, replace=False):
        changed = bytearray(good)
        changed[place] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        try:
            loaded = load_data(path)
        except ValueError:
            refused += 1
        else:
            assert loaded.train.x.equal(expected.train.x)
    assert refused > 50


def test_load_data_refuses_tensors_larger_than_memory(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**13, 3)}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt: x: .* would take 1\.2e\+05 GB"):
        load_data(tmp_path / "own.pt")
    torch.save({"x": numbered(5), "y": torch.zeros(1).expand(10**13)}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt: labels: one for each sample"):
        load_data(tmp_path / "own.pt")
    torch.save({"x": torch.zeros(2, 10**13, device="meta")}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt: "):
        load_data(tmp_path / "own.pt")


def test_load_data_refuses_an_older_pt_file_that_claims_too_much(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save({"x": torch.zeros(7, 3)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for size in (0x7FFFFFFF, 0x70000000):  # the number of values, as the pickle has it
        assert content.count(b"K\x15") >= 1
        path.write_bytes(content.replace(b"K\x15", b"J" + struct.pack("<i", size)))
        with pytest.raises(ValueError, match="not a file of plain tensors"):
            load_data(path)


def test_labels_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=numbered(6), labels=np.array(["a", "\udcff", "😀"] * 2))
    assert load_data(tmp_path / "own.npz").class_names == ("a", "\\udcff", "😀")
