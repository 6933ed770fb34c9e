"""The GPU's backends on CPU tensors, as more backends for tests where there is a GPU: they copy there and back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from csdiv import backends

NAME, TRITON_NAME = "gpu", "gpu_triton"


def _copied(value: Any, device: str) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: _copied(function(*_copied(arguments, "cuda")), "cpu")


def install() -> None:
    """Registers those of "cuda" and "triton" that can run here."""
    for backend, name in (("cuda", NAME), ("triton", TRITON_NAME)):
        if backend in backends.available_backends():
            register(importlib.import_module(f"csdiv.backends.{backend}"), name)


def register(cuda: ModuleType, backend: str = NAME) -> None:
    """Makes the functions of the backend ``cuda`` those of ``backend``."""
    module = ModuleType(f"csdiv.backends.{backend}")
    for name, value in vars(cuda).items():
        if name.startswith("__"):
            continue
        public = inspect.isfunction(value) and value.__module__ == cuda.__name__ and not name.startswith("_")
        setattr(module, name, on_gpu(value) if public else value)
    sys.modules[module.__name__] = module
    backends.NAMES = (*backends.NAMES, backend)
    if hasattr(cuda, "full_assign"):
        backends.FULL = (*backends.FULL, backend)
    backends._STATUS[backend] = lambda: backends.BackendStatus(True, "")
