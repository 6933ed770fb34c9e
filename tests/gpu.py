"""The CUDA backend on CPU tensors, as one more backend for tests where there is a GPU: "gpu" copies there and back."""

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

NAME = "gpu"


def _copied(value: Any, device: str) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: _copied(function(*_copied(arguments, "cuda")), "cpu")


def install() -> None:
    """Registers the backend if "cuda" can run here."""
    if "cuda" not in backends.available_backends():
        return
    register(importlib.import_module("csdiv.backends.cuda"))


def register(cuda: ModuleType) -> None:
    """Makes the functions of the backend ``cuda`` those of the backend "gpu"."""
    module = ModuleType(f"csdiv.backends.{NAME}")
    for name, value in vars(cuda).items():
        if name.startswith("__"):
            continue
        public = inspect.isfunction(value) and value.__module__ == cuda.__name__ and not name.startswith("_")
        setattr(module, name, on_gpu(value) if public else value)
    sys.modules[module.__name__] = module
    backends.NAMES = (*backends.NAMES, NAME)
    backends._STATUS[NAME] = lambda: backends.BackendStatus(True, "")
