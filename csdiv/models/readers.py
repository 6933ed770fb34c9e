"""Arrays and images in files that may be damaged or hostile: sizes are checked before memory is taken."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

DEFLATE_RATIO = 1032  # the most that deflate makes of a byte
DEPTHS = (8, 10, 12, 14, 16)  # bits of a gray level in files that have room for 16
_CHUNK = 1 << 24  # bytes


def check_memory(num_bytes: float, what: str) -> None:
    """Raises a ValueError if that is more than this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise ValueError(f"{what} would take {num_bytes / 1e9:.4g} GB, and this machine has {memory / 1e9:.4g}")


# .pt


def read_tensors(path: Path, map_location: Any = "cpu") -> Any:
    """What ``torch.save`` wrote of tensors, numbers, names and containers of them; nothing in the file is executed.

    Raises:
        ValueError: a damaged file, or with anything else in it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    _check_member(path, member)
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=map_location, weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, torch's unpickler raises whatever it stumbles over
        detail = f" ({error})" if isinstance(error, ValueError | zipfile.BadZipFile) else ""
        raise ValueError(f"truncated, or not a file of plain tensors{detail}") from error


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    """Raises a ValueError for a size that the file cannot hold."""
    stored = member.compress_type == zipfile.ZIP_STORED
    most = member.compress_size * (1 if stored else DEFLATE_RATIO) + (0 if stored else 64)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is neither stored nor deflated")
    if member.compress_size > path.stat().st_size or member.file_size > most:
        raise ValueError(f"{member.filename} cannot have the {member.file_size} bytes that its header claims")


# .npz


class NpzArrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz archive by their names, each read when it is asked for; nothing is unpickled.

    Raises:
        zipfile.BadZipFile: not an archive. ValueError: when asked, for what is no array, damaged, or of a size that the
            archive does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self._members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        _check_member(self.path, member)
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open(member) as file:
                    self._check_size(file, member.file_size)
                with archive.open(member) as file:
                    values = np.lib.format.read_array(file, allow_pickle=False)
                    file.read(1)  # at the end of the member its checksum is compared
                    return values
        except (ValueError, EOFError, NotImplementedError, SyntaxError, RecursionError) as error:
            raise ValueError(f"{name}: an array expected: {error}") from error

    @staticmethod
    def _check_size(file: IO[bytes], size: int) -> None:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError("numbers or names expected, not records")
        shape, _, dtype = readers[version](file)
        claimed, held = math.prod(shape) * dtype.itemsize, size - file.tell()
        if not dtype.hasobject and (min(shape, default=0) < 0 or claimed != held):
            raise ValueError(f"its header claims {claimed} bytes, {shape} of {dtype}, and it has {held}: truncated?")


# IDX


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, gzipped or not.

    Raises:
        ValueError: another format, truncated, or of another size than its header says.
    """
    packed, available = path.suffix == ".gz", path.stat().st_size
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if packed else raw
            head = file.read(4)
            sizes = file.read(4 * head[3]) if len(head) == 4 else b""
            if head[:3] != b"\x00\x00\x08" or len(sizes) != 4 * head[3]:
                raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{head[3]}I", sizes)
            size, most = math.prod(shape), available * DEFLATE_RATIO if packed else available
            if size > most:
                raise ValueError(f"{path.name} cannot have the {size} values that its header claims: truncated?")
            data = _read_at_most(file, size + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path.name} is not a complete gzip file: {error}") from error
    if len(data) != size:
        found = f"{len(data)} values instead of" if len(data) < size else "more values than the"
        raise ValueError(f"{path.name} has {found} {size}" + (": truncated?" if len(data) < size else " of its header"))
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def _read_at_most(file: Any, size: int) -> bytes:
    """Up to ``size`` bytes, in memory that grows with what is there."""
    buffer = io.BytesIO()
    while chunk := file.read(min(_CHUNK, size - buffer.tell())):
        buffer.write(chunk)
    return buffer.getvalue()


# images


def read_images(folder: Path, paths: Sequence[Path]) -> np.ndarray:
    """(n, H, W) or (n, H, W, 3) gray levels of images of one size and mode: uint8, or float32 in [0, 1].

    Levels of 16 bits are divided by the largest of 8, 10, 12, 14 or 16 bits, whichever is the least that holds those of
    all images: 12 bits of a camera stay no dark sixteenth.

    Raises:
        ValueError: names the first image that is unreadable, or unlike the first one.
    """
    from PIL import Image

    images: list[np.ndarray] = []
    reduced = 0
    for path in paths:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    check_memory(4.0 * len(paths) * math.prod(image.size), f"{len(paths)} images")
                    was_reduced = ";16" in str(image.tile) and not image.mode.startswith("I")
                    images.append(_pixels(image))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise ValueError(f"{_shown(path, folder)} is not a readable image: {error}") from error
        if was_reduced:
            reduced = max(reduced, int(images[-1].max(initial=0)), 1)
        if images[-1].shape != images[0].shape:
            first, this = ((a.shape[1], a.shape[0], *a.shape[2:]) for a in (images[0], images[-1]))
            raise ValueError(
                f"images of one size and mode expected, got {first} in {_shown(paths[0], folder)} "
                f"and {this} in {_shown(path, folder)}"
            )
    if 0 < reduced < 64:
        raise ValueError("colour images of 16 bits use 14 or fewer of them, too dark in 8: convert them before")
    deep = [int(image.max(initial=0)) for image in images if image.dtype == np.uint16]
    if not deep:
        return np.stack(images)
    top = next(2**bits - 1 for bits in DEPTHS if max(deep) < 2**bits)
    return np.stack([np.float32(image / (top if image.dtype == np.uint16 else 255)) for image in images])


def _shown(path: Path, folder: Path) -> str:
    return printable(path.relative_to(folder).as_posix())


def printable(name: str) -> str:
    """A name of a file as text, bytes that are no UTF-8 as escapes, in every locale."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # text that this locale has no bytes for
        return name.encode("utf-8", "backslashreplace").decode()


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 or uint16, or (H, W, 3) uint8, transparency left out."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return np.asarray(image).astype(np.uint16)  # convert would clip all above 255 to white
    if image.mode in ("I", "F"):
        raise ValueError(f"8 or 16 bits for a pixel and channel expected, got {image.format} of 32")
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
