"""The backends: which can run here, why the others cannot, and which one "auto" takes.

Every backend is a module with the same functions on the same tensors; :mod:`csdiv.backends.reference` documents them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from csdiv.backends.dispatch import Shape, order_of, rule_of
from csdiv.kernels.configurations import MATRIX_DIM, Shared, form_of, structure_of

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
FULL, MAX_FULL_DIM = ("cpu", "cuda"), 32
"""The native backends that have full covariances, and the largest D that they have them for."""
_NATIVE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""Of each kind of device the backends that compute on it."""


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why and what would help."""

    available: bool
    reason: str


def backend_status() -> dict[str, BackendStatus]:
    """The status of every backend.

    Example:
        >>> csdiv.backend_status()["reference"]
        BackendStatus(available=True, reason='')
    """
    return {name: status() for name, status in _STATUS.items()}


def available_backends() -> tuple[str, ...]:
    """The names of the backends that can run here, for example ("reference", "cpu")."""
    return tuple(name for name, status in backend_status().items() if status.available)


def check_name(name: str) -> None:
    """Raises ValueError unless ``name`` is one of :data:`NAMES`."""
    if name not in NAMES:
        raise ValueError(f"backend: one of {', '.join(map(repr, NAMES))} expected, got {name!r}")


def resolve(name: str, device: torch.device, shape: Shape = Shape()) -> ModuleType:  # noqa: B008
    """The module that computes on ``device``.

    "auto" is the first backend of its line in :mod:`csdiv.backends.dispatch` that can run, else "reference", on a GPU
    with one warning. Any other name is that backend or an error.

    Raises:
        RuntimeError: the backend asked for by name cannot run here, or not on this device.
    """
    return _resolve(name, device, order_of(device.type, shape) if name == "auto" else ())


@functools.cache
def _resolve(name: str, device: torch.device, order: tuple[str, ...]) -> ModuleType:
    check_name(name)
    if name == "auto":
        name = _first_able(order, device)
        if device.type == "cuda" and name == "reference":
            _warn_slow_cuda()
    if name != "reference":
        status = _STATUS[name]()
        if not status.available:
            raise RuntimeError(f'backend "{name}" is not available: {status.reason}')
        for kind, names in _NATIVE.items():
            if name in names and device.type != kind:
                raise RuntimeError(
                    f'backend "{name}" computes on {kind.upper()} tensors, got {device}: '
                    'move them, or take backend="auto"'
                )
        if name == "cuda" and (reason := _missing_kernels(device)):
            raise RuntimeError(f'backend "cuda" is not available: {reason}')
    return importlib.import_module(f"csdiv.backends.{name}")


def resolve_full(name: str, device: torch.device) -> ModuleType:
    """:func:`resolve` for full covariances: "auto" is "reference" where the native backend has none."""
    module = resolve(name, device)
    if name == "auto" and module.__name__.rpartition(".")[2] not in FULL:
        return importlib.import_module("csdiv.backends.reference")
    return module


def _first_able(order: tuple[str, ...], device: torch.device) -> str:
    able = (name for name in order if _STATUS[name]().available)
    return next((name for name in able if name != "cuda" or not _missing_kernels(device)), "reference")


def shape_of(n: int, m: int, dim: int, p_variances: Sequence[int], q_variances: Sequence[int]) -> Shape:
    """What the choice depends on, from the sizes of a problem and the shapes of the variances."""
    sides = (Shared(shape[-1] == 1, shape[-2] == 1) for shape in (p_variances, q_variances))
    return Shape(n, m, dim, structure_of(*sides))


def explain(device: str, shape: Shape) -> list[str]:
    """Which backend "auto" prefers for a problem and why, which it takes here, and the form of the pair term."""
    rule = rule_of(device, shape)
    if rule is None:
        return [f"reference: csdiv has no kernels for {device}"]
    present = device == "cpu" or torch.cuda.is_available()
    taken = _first_able(rule.order, torch.device(device)) if present else ""
    lines = [f"preferred: {', then '.join(rule.order)}: {rule.why}"]
    lines += [f"taken here: {taken}" if present else "taken here: none, torch sees no GPU"]
    return [*lines, f"form: {_form(taken or rule.order[0], shape)}"]


def _form(backend: str, shape: Shape) -> str:
    if backend != "triton" or shape.structure == "diagonal":
        return "diagonal, a variance for each component and dimension"
    forms = {dtype: form_of(shape.structure, dtype, shape.dim) for dtype in (torch.float32, torch.float64)}
    direct = "the sum of squares" + (f", as D < {MATRIX_DIM}" if shape.dim < MATRIX_DIM else "")
    products = "matrix products, in tiles whose error bound fits the budget, else the sum of squares"
    return "; ".join(
        f"{form} in {str(dtype).removeprefix('torch.')}: {direct if form == shape.structure else products}"
        for dtype, form in forms.items()
    )


def _once(function: Callable[[], BackendStatus]) -> Callable[[], BackendStatus]:
    """Remembers the status: what is installed does not change while a program runs."""
    found: list[BackendStatus] = []

    @functools.wraps(function)
    def status() -> BackendStatus:
        if not found:
            found.append(function())
        return found[0]

    return status


@_once
def _native_status() -> BackendStatus:
    try:
        importlib.import_module("csdiv._C")
    except ImportError as error:
        return BackendStatus(False, f"the native module does not import ({error}): reinstall with pip install .")
    return BackendStatus(True, "")


@_once
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
    reason = _missing_kernels(torch.device("cuda", torch.cuda.current_device()))
    return BackendStatus(not reason, reason)


@functools.cache
def _missing_kernels(device: torch.device) -> str:
    """Why the CUDA kernels do not run on this GPU, though they do on some; empty if they do."""
    import csdiv._C as _C

    if device.type != "cuda" or not (error := _C.cuda_kernels_status(device.index or 0)):
        return ""
    name = torch.cuda.get_device_name(device)
    return f"{_C.cuda_status}, but not for {name} ({error}): set CSDIV_CUDA_ARCHS and build again"


@_once
def _triton_status() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus(False, "the package triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        return BackendStatus(False, "torch sees no GPU: torch.cuda.is_available() is False")
    if torch.version.hip:
        return BackendStatus(False, "its kernels have instructions of NVIDIA GPUs, and this torch is for AMD ones")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return BackendStatus(
            False, f"compute capability 8.0 or later is needed, {torch.cuda.get_device_name()} has {major}.{minor}"
        )
    try:
        importlib.import_module("csdiv.backends.triton")
    except ImportError as error:
        return BackendStatus(
            False, f"the package triton does not import ({error}): install the one that torch asks for"
        )
    return BackendStatus(True, "")


@_once
def _warn_slow_cuda() -> BackendStatus:
    reasons = "; ".join(f"{name}: {backend_status()[name].reason}" for name in ("cuda", "triton"))
    warnings.warn(
        f"csdiv computes on CUDA tensors with the eager reference, which is slow ({reasons})",
        RuntimeWarning,
        stacklevel=2,
    )
    return BackendStatus(False, "")


_STATUS: dict[str, Callable[[], BackendStatus]] = {
    "reference": lambda: BackendStatus(True, ""),
    "cpu": _native_status,
    "cuda": _cuda_status,
    "triton": _triton_status,
}
