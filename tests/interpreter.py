"""The Triton backend on CPU tensors, as one more backend for tests: "interpreter" runs its kernels in Python.

How a kernel runs is settled where it is decorated: triton and the kernels are imported here, interpreted, before
anybody else does. Other processes, and torch's own compiler, do not see it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

from csdiv import backends

NAME = "interpreter"
PROCESSORS = 1  # work is cut in parts where it is less than a few tiles


def install() -> None:
    """Registers the backend: csdiv/backends/triton.py; not without triton, nor with a GPU that runs its kernels."""
    if not importlib.util.find_spec("triton") or torch.cuda.is_available():
        return
    assert "triton" not in sys.modules, "triton has been imported, not interpreted"
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        importlib.import_module("triton")
        with contextlib.suppress(ImportError):  # a part of triton that a launch would import
            importlib.import_module("triton.experimental.gluon")
        module = importlib.import_module("csdiv.backends.triton")
    finally:
        del os.environ["TRITON_INTERPRET"]
    _patch_once()

    backends.register(NAME, without_gpu(module.Triton))


def without_gpu(triton: type[Any]) -> type[Any]:
    """csdiv.backends.triton.Triton on CPU tensors, asking nothing of a GPU."""

    class WithoutGpu(triton):  # type: ignore[misc]
        def processors(self, device: torch.device) -> int:
            return PROCESSORS

        def current(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
            return contextlib.nullcontext()

        def capturing(self) -> bool:
            return False

    return WithoutGpu


def _patch_once() -> None:
    """The language is patched when a kernel starts; each call of a function in it would do it again, half the time."""
    interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    plain = interpreted.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        own = self.fn.__module__.startswith("csdiv.")
        return self.rewrite()(*arguments, **options) if own else plain(self, *arguments, **options)

    interpreted.__call__ = call
