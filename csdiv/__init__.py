"""Closed-form divergences between Gaussian mixtures, exact and fast, for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from csdiv import process  # noqa: F401 - prepares it for forks

if TYPE_CHECKING:
    from csdiv import nn
    from csdiv.backends import BackendStatus, available_backends, backend_status, empty_cache
    from csdiv.distances import cosine_similarity, ise, mmd2, nise, renyi2_entropy
    from csdiv.functional import (
        component_log_overlap,
        cs_divergence,
        cs_regularizer,
        log_overlap,
        pairwise_log_overlap,
        warmup,
    )
    from csdiv.mixture import GaussianMixture
    from csdiv.weightings import channel_cs_divergence, channel_log_overlap

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "GaussianMixture",
    "available_backends",
    "backend_status",
    "channel_cs_divergence",
    "channel_log_overlap",
    "component_log_overlap",
    "cosine_similarity",
    "cs_divergence",
    "cs_regularizer",
    "empty_cache",
    "ise",
    "log_overlap",
    "mmd2",
    "nise",
    "nn",
    "pairwise_log_overlap",
    "renyi2_entropy",
    "warmup",
]

_MODULES = (
    {"GaussianMixture": "mixture"}
    | dict.fromkeys(("BackendStatus", "available_backends", "backend_status", "empty_cache"), "backends")
    | dict.fromkeys(("channel_cs_divergence", "channel_log_overlap"), "weightings")
    | dict.fromkeys(("cosine_similarity", "ise", "mmd2", "nise", "renyi2_entropy"), "distances")
)


def __getattr__(name: str) -> Any:
    """Names are imported when they are first used, so that ``csdiv --help`` need not wait for torch."""
    if name in __all__ and name != "nn":
        value = getattr(importlib.import_module(f"csdiv.{_MODULES.get(name, 'functional')}"), name)
        globals()[name] = value  # found without this function from now on, as submodules are
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"csdiv.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"csdiv.{name}":
                raise
    raise AttributeError(f"module 'csdiv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
