"""The GPU's backends on CPU tensors, as more backends for tests where there is a GPU: they copy there and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from csdiv import backends
from csdiv.backends.base import Backend, Tensors

NAME, TRITON_NAME = "gpu", "gpu_triton"


def _copied(value: Any, device: str) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)


class OnGpu(Backend):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def forward(self, name: str, tensors: Tensors, needs: Sequence[bool]) -> tuple[list[Tensor], list[Tensor]]:
        return _copied(self._backend.forward(name, _copied(list(tensors), "cuda"), needs), "cpu")

    def backward(
        self, name: str, grad: Tensor, tensors: Tensors, outputs: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        grad, tensors, outputs = _copied((grad, list(tensors), list(outputs)), "cuda")
        return _copied(self._backend.backward(name, grad, tensors, outputs, needs), "cpu")

    def assign(self, name: str, tensors: Tensors) -> Tensor:
        return self._backend.assign(name, _copied(list(tensors), "cuda")).cpu()


def install() -> None:
    """Registers those of "cuda" and "triton" that can run here."""
    for backend, name in (("cuda", NAME), ("triton", TRITON_NAME)):
        if backend in backends.available_backends():
            register(backend, name)


def register(backend: str, name: str) -> None:
    """Registers ``backend`` on copies, as ``name``."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    backends.register(name, lambda: OnGpu(backends.resolve(backend, device)), full=backends.has_full(backend))
