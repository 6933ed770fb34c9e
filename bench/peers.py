"""Providers: csdiv and what it replaces, each as ``forward`` and ``forward_backward`` of Σ_i ℓ_i.

ℓ_i = log Σ_j b_j N(μ_i; ν_j, S_i + T_j); forward returns (N,), forward_backward the five gradients.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

import csdiv

LOG_2PI = math.log(2.0 * math.pi)
CHUNK_BYTES = 2 * 2**20  # the fastest eager chunk on CPUs: temporaries stay in the cache


def rows(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
    """The formula as people write it; (N, M, D) temporaries."""
    c = s[:, None] + t
    delta = mu[:, None] - nu
    return torch.logsumexp(log_b - 0.5 * (delta * delta / c + c.log() + LOG_2PI).sum(-1), -1)


def _autograd(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return list(torch.autograd.grad(function(*leaves).sum(), leaves))


class Provider:
    """One way to compute; subclasses override ``forward``, and ``forward_backward`` where autograd is not the way."""

    name = ""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        return _autograd(lambda *x: self.forward(list(x)), inputs)


class Csdiv(Provider):
    def __init__(self, backend: str) -> None:
        self.name, self.backend = f"csdiv {backend}", backend

    def forward(self, inputs: list[Tensor]) -> Tensor:
        mu, s, nu, t, log_b = inputs
        p, q = csdiv.GaussianMixture(mu, s), csdiv.GaussianMixture(nu, t, log_b)
        return csdiv.component_log_overlap(p, q, backend=self.backend)


class ChunkedEager(Provider):
    """Rows in chunks, each differentiated at once, so that temporaries stay small."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.name, self._bytes = f"eager, {chunk_bytes // 2**20} MiB chunks", chunk_bytes

    def _chunks(self, inputs: list[Tensor]) -> range:
        return range(0, len(inputs[0]), self._size(inputs))

    def _size(self, inputs: list[Tensor]) -> int:
        return max(1, self._bytes // (4 * inputs[2].numel()))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        mu, s, *q = inputs
        size = self._size(inputs)
        return torch.cat([rows(mu[i : i + size], s[i : i + size], *q) for i in self._chunks(inputs)])

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        mu, s, *q = leaves
        size = self._size(inputs)
        for i in self._chunks(inputs):
            rows(mu[i : i + size], s[i : i + size], *q).sum().backward()
        return [x.grad for x in leaves if x.grad is not None]


class Compiled(Provider):
    name = "torch.compile"

    def __init__(self) -> None:
        self._rows = torch.compile(rows, dynamic=False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self._rows(*inputs)


def _rows_and_weights(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    c = s[:, None] + t
    delta = mu[:, None] - nu
    logits = log_b - 0.5 * (delta * delta / c + c.log() + LOG_2PI).sum(-1)
    lse = torch.logsumexp(logits, -1)
    return lse, (logits - lse[:, None]).exp()


def _pair_gradients(r: Tensor, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    u = (mu[:, None] - nu) / (s[:, None] + t)
    return (r[..., None] * u).sum(dim), 0.5 * (r[..., None] * (u * u - 1.0 / (s[:, None] + t))).sum(dim)


class HandDerived(Compiled):
    """Gradients derived by hand, compiled: what an expert gets without writing a kernel; stores (N, M) weights."""

    name = "torch.compile, hand-derived gradients"

    def __init__(self) -> None:
        super().__init__()
        self._weights = torch.compile(_rows_and_weights, dynamic=False)
        self._gradients = torch.compile(_pair_gradients, dynamic=False)

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        mu, s, nu, t, _ = inputs
        _, r = self._weights(*inputs)
        grad_mu, grad_s = self._gradients(r, mu, s, nu, t, 1)
        grad_nu, grad_t = self._gradients(r, mu, s, nu, t, 0)
        return [-grad_mu, grad_s, grad_nu, grad_t, r.sum(0)]


class KeOps(Provider):
    """Symbolic log-sum-exp; set CXXFLAGS="-march=native -ffast-math" before the first call for its best numbers."""

    name = "KeOps"

    def forward(self, inputs: list[Tensor]) -> Tensor:
        from pykeops.torch import LazyTensor

        mu, s, nu, t, log_b = inputs
        d = mu.shape[-1]
        c = LazyTensor(s[:, None].contiguous()) + LazyTensor(t[None].contiguous())
        delta = LazyTensor(mu[:, None].contiguous()) - LazyTensor(nu[None].contiguous())
        logits = LazyTensor(log_b[None, :, None].contiguous()) - 0.5 * ((delta * delta / c).sum(-1) + c.log().sum(-1))
        return logits.logsumexp(dim=1)[:, 0] - 0.5 * d * LOG_2PI


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def providers() -> list[Provider]:
    """csdiv's native CPU backend, and every peer that is installed."""
    peers = [ChunkedEager(), Compiled(), HandDerived()]
    if installed("pykeops"):
        peers.append(KeOps())
    return [Csdiv("cpu"), *peers]
