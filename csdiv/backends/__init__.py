"""The backends: which can run here, why the others cannot, and which one "auto" takes.

A backend is an object, see :class:`csdiv.backends.base.Backend`, under a name that :func:`register` gave it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from csdiv.backends.base import Backend
from csdiv.backends.composed import Composed
from csdiv.kernels.configurations import MATRIX_DIM, Shared, form_of, structure_of  # which imports no triton

MAX_FULL_DIM = 32
"""The largest D that native backends have full covariances for."""

AUTO = {
    "cpu": (("cpu",), "it alone computes on CPU tensors"),
    "cuda": (
        ("cuda", "triton"),
        "fewer instructions for an element than triton, and one pass over the pairs for the gradients of both sides; "
        "counted, not timed: docs/kernels.md",
    ),
}
"""The backends that "auto" takes on each kind of device, the first that can run, and why; else "reference"."""


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why and what would help."""

    available: bool
    reason: str


class _Registered(NamedTuple):
    load: Callable[[], Backend]
    status: Callable[[], BackendStatus]
    device: str | None  # the kind of device that it computes on, None: CPUs and CUDA devices
    full: bool  # whether it has full covariances, up to MAX_FULL_DIM
    factors: bool  # whether it takes factors of them against points
    missing: Callable[[torch.device], str] | None  # why it cannot run on a device, though it can on others


_registered: dict[str, _Registered] = {}
NAMES = _registered.keys()
"""Those of all backends, "auto" aside; a view, which grows with :func:`register`."""


def register(
    name: str,
    load: Callable[[], Backend],
    *,
    device: str | None = None,
    full: bool = False,
    factors: bool = False,
    status: Callable[[], BackendStatus] = lambda: BackendStatus(True, ""),
    missing: Callable[[torch.device], str] | None = None,
) -> None:
    """Adds a backend, or replaces the one of this name.

    Args:
        name: what ``backend=`` takes, and :func:`backend_status` lists.
        load: gives the backend; called when it is first needed.
        device: the kind of device whose tensors it computes on, "cpu" or "cuda"; default both.
        full: whether it has the operators for full covariances, with D ≤ ``MAX_FULL_DIM``.
        factors: whether it has those named "factored_…" as well; else factors are multiplied out for it.
        status: whether it can run on this machine. By default it can.
        missing: why it cannot run on a device, though it can on others, or "". By default it can run on all.

    Raises:
        ValueError: the name is "auto".
    """
    if name == "auto":
        raise ValueError('name: any but "auto" expected')
    _registered[name] = _Registered(functools.cache(load), status, device, full, factors, missing)
    resolve.cache_clear()


@contextlib.contextmanager
def registrations_restored() -> Iterator[None]:
    """What is registered within is forgotten at the end, and what was replaced is back."""
    before = dict(_registered)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(before)
        resolve.cache_clear()


def backend_status() -> dict[str, BackendStatus]:
    """The status of every backend, on the current CUDA device where it computes on such.

    Example:
        >>> csdiv.backend_status()["reference"]
        BackendStatus(available=True, reason='')
    """
    return {name: _status(name) for name in _registered}


def _status(name: str, device: torch.device | None = None) -> BackendStatus:
    """That of a backend on ``device``, None: the current CUDA device. No other one gets a context."""
    registered = _registered[name]
    status = registered.status()
    if registered.missing is None or not status.available:
        return status
    if device is None or device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    reason = registered.missing(device)
    return BackendStatus(not reason, reason)


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run here, for example ("reference", "cpu")."""
    return tuple(name for name, status in backend_status().items() if status.available)


def empty_cache() -> None:
    """Gives back the memory that the CPU kernels keep between calls: up to 256 MiB, whatever the number of threads.

    The next call on large mixtures takes longer, by what the system needs to provide that memory again; results do not
    change. Each thread keeps up to 4 MiB more until it ends; the calling thread's are given back as well. PyTorch owns
    all memory on GPUs: ``torch.cuda.empty_cache()``.
    """
    native = sys.modules.get("csdiv._C")  # which keeps nothing before it is imported
    if native is not None:
        native.cpu_empty_cache()


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is "auto" or that of a backend."""
    if not isinstance(name, str) or (name != "auto" and name not in _registered):
        names = ", ".join(map(repr, ("auto", *_registered)))
        raise ValueError(f"backend: one of {names} expected, got {name!r}")


def has_full(name: str) -> bool:
    """Whether a backend has kernels for full covariances."""
    return _registered[name].full


def has_factors(name: str, device: torch.device) -> bool:
    """Whether a backend, or the one that "auto" prefers on ``device``, has kernels for factors against points."""
    return _registered[AUTO[device.type][0][0] if name == "auto" else name].factors


@functools.cache
def resolve(name: str, device: torch.device, operator: str = "") -> Backend:
    """The backend that computes ``operator``, "": any, on ``device``.

    "auto" is the first backend of its line in :data:`AUTO` that can run, else "reference", on a GPU with one warning;
    it is "reference" where that one lacks the operator. Any other name is that backend or an error. What a backend
    composes of its other operators is computed by a :class:`csdiv.backends.composed.Composed` of it.

    Raises:
        RuntimeError: the backend asked for by name cannot run here, or not on this device.
        NotImplementedError: it lacks the operator.
    """
    check_name(name)
    automatic = name == "auto"
    if name == "auto":
        name = _first_able(device)
        if device.type == "cuda" and name == "reference":
            _warn_slow_cuda(device)
        if operator.startswith(("full_", "factored_")) and not has_full(name):
            name = "reference"
    registered = _registered[name]
    fits = registered.device in (None, device.type)
    status = _status(name, device) if fits else registered.status()
    if not status.available:
        raise RuntimeError(f'backend "{name}" is not available: {status.reason}')
    if not fits:
        raise RuntimeError(
            f'backend "{name}" computes on {str(registered.device).upper()} tensors, got {device}: '
            'move them, or take backend="auto"'
        )
    backend = registered.load()
    if operator in backend.lacks:
        if automatic:
            return resolve("reference", device)
        raise NotImplementedError(f'backend "{name}" has no {operator}: take backend="auto" or "reference"')
    return Composed(backend) if operator in backend.composed else backend


def _first_able(device: torch.device) -> str:
    order, _ = AUTO.get(device.type, ((), ""))
    return next((name for name in order if _status(name, device).available), "reference")


def explain(device: str, dim: int, p_variances: Sequence[int], q_variances: Sequence[int]) -> list[str]:
    """Which backend "auto" prefers for variances of these shapes and why, which it takes here, and the pair's form."""
    if device not in AUTO:
        return [f"reference: csdiv has no kernels for {device}"]
    order, why = AUTO[device]
    present = device == "cpu" or torch.cuda.is_available()
    taken = _first_able(torch.device(device)) if present else ""
    structure = structure_of(*(Shared(shape[-1] == 1, shape[-2] == 1) for shape in (p_variances, q_variances)))
    return [
        f"preferred: {', then '.join(order)}: {why}",
        f"taken here: {taken}" if present else "taken here: none, torch sees no GPU",
        f"form: {_form(taken or order[0], structure, dim)}",
    ]


def _form(backend: str, structure: str, dim: int) -> str:
    if backend != "triton" or structure == "diagonal":
        return "diagonal, a variance for each component and dimension"
    forms = {dtype: form_of(structure, dtype, dim) for dtype in (torch.float32, torch.float64)}
    direct = "the sum of squares" + (f", as D < {MATRIX_DIM}" if dim < MATRIX_DIM else "")
    products = "matrix products, in tiles whose error bound fits the budget, else the sum of squares"
    return "; ".join(
        f"{form} in {str(dtype).removeprefix('torch.')}: {direct if form == structure else products}"
        for dtype, form in forms.items()
    )


@functools.cache
def _native_status() -> BackendStatus:
    try:
        importlib.import_module("csdiv._C")
    except ImportError as error:
        return BackendStatus(False, f"the native module does not import ({error}): reinstall with pip install .")
    return BackendStatus(True, "")


@functools.cache
def _cuda_status() -> BackendStatus:
    if not _native_status().available:
        return _native_status()
    import csdiv._C as _C

    if not _C.has_cuda:
        return BackendStatus(False, _C.cuda_status)
    runtime, driver = _C.cuda_versions()
    built = f"{_C.cuda_status}, but "
    if driver == 0:
        return BackendStatus(False, built + "this machine has no NVIDIA driver")
    if driver // 1000 < runtime // 1000:
        had = f"{driver // 1000}.{driver % 1000 // 10}"
        return BackendStatus(
            False, f"{built}the driver is for CUDA {had} at most: update it, or build with nvcc {driver // 1000}.x"
        )
    if not torch.cuda.is_available():
        return BackendStatus(False, built + "torch sees no GPU: torch.cuda.is_available() is False")
    return BackendStatus(True, "")


@functools.cache
def _missing_kernels(device: torch.device) -> str:
    """Why the CUDA kernels do not run on this GPU, though they do on some; empty if they do."""
    import csdiv._C as _C

    with torch.cuda.device(device):
        error = _C.cuda_kernels_status(device.index)
    if not error:
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{_C.cuda_status}, but not for {name} ({error}): set CSDIV_CUDA_ARCHS and build again"


@functools.cache
def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        return BackendStatus(False, "torch sees no GPU: torch.cuda.is_available() is False")
    if torch.version.hip:
        return BackendStatus(False, "its kernels have instructions of NVIDIA GPUs, and this torch is for AMD ones")
    try:
        importlib.import_module("csdiv.backends.triton")
    except ImportError as error:
        return BackendStatus(
            False, f"the package triton does not import ({error}): install the one that torch asks for"
        )
    return BackendStatus(True, "")


@functools.cache
def _too_old(device: torch.device) -> str:
    """Why the Triton kernels do not run on this GPU; empty if they do."""
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return ""
    return f"compute capability 8.0 or later is needed, {torch.cuda.get_device_name(device)} has {major}.{minor}"


@functools.cache
def _warn_slow_cuda(device: torch.device) -> None:
    reasons = "; ".join(f"{name}: {_status(name, device).reason}" for name in AUTO["cuda"][0])
    warnings.warn(
        f"csdiv computes on CUDA tensors with the eager reference, which is slow ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )


def _module(name: str) -> Callable[[], Backend]:
    """Imports csdiv.backends.<name> when the backend is first needed."""
    return lambda: importlib.import_module(f"csdiv.backends.{name}").backend


register("reference", _module("reference"), full=True, factors=True)
register("cpu", _module("cpu"), device="cpu", full=True, factors=True, status=_native_status)
register("cuda", _module("cuda"), device="cuda", full=True, status=_cuda_status, missing=_missing_kernels)
register("triton", _module("triton"), device="cuda", status=_triton_status, missing=_too_old)
