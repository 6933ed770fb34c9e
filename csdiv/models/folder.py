"""A run's directory: what is in it, which files csdiv wrote, and that one process at a time works there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, OPTIONS, RESUME = "model.safetensors", "config.json", "config.toml", "resume.ckpt"
METRICS, REPORT, SCORES = "metrics.jsonl", "report.html", "scores.json"
FIGURES, TENSORBOARD = "figures", "tensorboard"
LOCK, MANIFEST = "run.lock", "files.txt"
FILES = (WEIGHTS, CONFIG, OPTIONS, RESUME, METRICS, REPORT, SCORES)
FOLDERS = (FIGURES, TENSORBOARD)
FIGURE_FILES = tuple(
    f"{FIGURES}/{name}.png"
    for name in ("overview", "samples", "reconstructions", "interpolations", "prototypes", "latent", "curves")
)
CLOCK = "seconds.json"  # how long a study has trained a model
_HEADER = "# written by csdiv: train --overwrite removes these files and no others"


class FolderInUse(OSError):
    """Another process works in a directory; the message says which."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file in full or not at all: to a temporary file beside it, then renamed."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # interrupted when it was renamed already
            os.unlink(temporary)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises: FileNotFoundError. ValueError: not JSON, names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def record(directory: Path, name: str) -> None:
    """Adds a file that is about to be written to the manifest, if the directory has one."""
    names = _manifest(directory)
    if names is not None and name not in names:
        with (directory / MANIFEST).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")


def write(directory: Path, name: str, content: str | bytes) -> None:
    """Writes a file of a run in full or not at all, and records it."""
    record(directory, name)
    write_atomically(directory / name, content)


def check_files_and_folders(directory: Path, files: tuple[str, ...] = (), folders: tuple[str, ...] = ()) -> None:
    """Raises an OSError if a file is where a folder is needed, or the other way round, or nothing can be written."""
    existing = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
    for place in (existing, *(directory / name for name in folders)):
        if os.path.lexists(place) and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file, and a folder is needed there")
        if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place}: no permission to write there")
    for name in files:
        if (directory / name).is_dir():
            raise IsADirectoryError(f"{directory / name} is a folder, and a file is to be written there")


def check_output_dir(directory: Path, data: str, *, overwrite: bool, resume: bool, ours: bool = False) -> None:
    """Raises unless a run may write to a directory; touches nothing.

    Args:
        directory: need not exist.
        data: "digits" or the place of the data, which may not be inside.
        overwrite: the results of an earlier run may be there, and are to go.
        resume: the run itself is there.
        ours: this process holds the directory.

    Raises:
        FileExistsError: not empty and neither ``overwrite`` nor ``resume``; ``overwrite`` of what is no run; files of
            others where the run's would be.
        FolderInUse: another process works there.
        OSError: a file where a folder is needed, or a folder where a file is.
        ValueError: the data are inside, or it is inside the data, a folder of images.
    """
    check_files_and_folders(directory, (*FILES, LOCK, MANIFEST), FOLDERS)
    if data != "digits":
        _check_data_place(directory, Path(data), resume)
    if not directory.is_dir() or {path.name for path in directory.iterdir()} <= {LOCK, CLOCK}:
        return
    if not ours and (holder := _holder(directory)):
        raise FolderInUse(f"{directory} is in use by {holder}")
    if not overwrite and not resume:
        raise FileExistsError(f"{directory} is not empty: pass --overwrite to replace its results, --resume to go on")
    if not resume and not is_run(directory):
        raise FileExistsError(
            f"{directory} is not a run of csdiv, and --overwrite replaces nothing else: choose an empty or new folder"
        )
    check_replaced(directory, (*FILES, *FIGURE_FILES))


def _check_data_place(directory: Path, data: Path, resume: bool) -> None:
    """Raises a ValueError if a run could replace its data, or add to them."""
    source, place = data.resolve(), directory.resolve()
    if source.is_relative_to(place) and source.exists():
        inside = source.relative_to(place).parts
        if not resume or not inside or inside[0] in (*FILES, *FOLDERS, LOCK, MANIFEST):
            raise ValueError(f"data: {data} is inside the output directory {directory}: choose another output_dir")
    if place.is_relative_to(source) and source.is_dir() and not any(source.glob("train-images*")):
        raise ValueError(f"output_dir: {directory} is inside the images {data}, of which its figures would become some")


def check_replaced(directory: Path, names: Sequence[str]) -> None:
    """Raises a FileExistsError if one of the files that a run writes is there and not csdiv's, by the manifest."""
    written = _manifest(directory)
    for name in names:
        if written is not None and name not in written and (directory / name).exists():
            raise FileExistsError(f"{directory / name} was not written by csdiv and would be replaced: move it first")


def is_run(directory: Path) -> bool:
    """Whether csdiv wrote a run there: by its manifest; before there was one, by config.json and config.toml."""
    return _manifest(directory) is not None or _is_older_run(directory)


def _manifest(directory: Path) -> list[str] | None:
    """The names in the manifest; None if there is none."""
    try:
        header, *names = (directory / MANIFEST).read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return None
    return names[:-1] if header == _HEADER else None  # what follows the last line end was cut off by a kill


def _is_older_run(directory: Path) -> bool:
    try:
        content = read_json(directory / CONFIG)
        options = (directory / OPTIONS).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return False
    made = isinstance(content, dict) and isinstance(content.get("versions"), dict) and "csdiv" in content["versions"]
    return made and isinstance(content.get("model"), dict) and options.startswith("# csdiv ")


def clear(directory: Path) -> None:
    """Removes the files that csdiv wrote, and no others, and begins a manifest."""
    names = _manifest(directory)
    if names is None and _is_older_run(directory):
        names = [*FILES, *FIGURE_FILES, *tensorboard_files(directory)]
    for name in names or ():
        path = directory / name
        known = name in FILES or (path.parent.name in FOLDERS and path.parent.parent == directory)
        if known and not path.is_dir() and not path.parent.is_symlink():
            path.unlink(missing_ok=True)
    for name in FOLDERS:
        with contextlib.suppress(OSError):  # something else is in it, or it is not there
            (directory / name).rmdir()
    write_atomically(directory / MANIFEST, f"{_HEADER}\n")


def tensorboard_files(directory: Path) -> set[str]:
    """Those that PyTorch's and Lightning's writers make, with names that they choose."""
    folder = directory / TENSORBOARD
    paths = [*folder.glob("events.out.tfevents.*"), *folder.glob("hparams.yaml")]
    return {f"{TENSORBOARD}/{path.name}" for path in paths}


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds a directory, which is made if need be, until the end of the block or of the process.

    Raises:
        FolderInUse: another holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _lock(directory, descriptor)
        try:
            yield
        finally:
            os.truncate(descriptor, 0)
            with contextlib.suppress(OSError):  # a forked child may have the descriptor too, and would hold on
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(directory: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FolderInUse(f"{directory} is in use by {_read_holder(descriptor)}") from error
    except OSError as error:
        warnings.warn(f"{directory} cannot be locked ({error}): start no second run there", stacklevel=4)
    os.truncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n".encode(), 0)


def _holder(directory: Path) -> str:
    """Who holds a directory; empty if nobody does."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return ""


def _read_holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
