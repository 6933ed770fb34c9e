"""Providers: csdiv and what it replaces, each with ``forward`` and ``forward_backward`` of an entry's sum.

forward returns the values of :mod:`bench.formulas`, forward_backward the gradients to all inputs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from .cases import Case
from .formulas import FORMULAS, LOG_2PI, Formula, pairs, rows, rows_in_chunks, with_csdiv

CHUNK_BYTES = 2 * 2**20  # the fastest eager chunk on CPUs: temporaries stay in the cache
BYTES_PER_ELEMENT = 12
"""Of what autograd keeps of an (N, M, D) computation in float32."""


class Provider:
    """One way to compute an entry; subclasses set ``name`` and ``formula``, or override what differs."""

    name = ""
    formula: Formula
    backward = True  # whether it has gradients
    bytes_per_element = 0  # temporaries of forward_backward
    pause = (
        0.0  # seconds for which threads spin after a call, in wait for the next: others would find no processor free
    )

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.formula(*inputs)

    def values(self, inputs: list[Tensor]) -> list[Tensor]:
        """What ``forward`` returns, in a list as gradients are."""
        return [self.forward(inputs)]

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(self.forward(leaves).sum(), leaves))


class Csdiv(Provider):
    def __init__(self, backend: str, entry: str = "rows") -> None:
        self.name, self.formula = f"csdiv {backend}", with_csdiv(entry, backend)


class Eager(Provider):
    """The formula as it stands: (N, M, D) temporaries."""

    name, bytes_per_element = "eager", BYTES_PER_ELEMENT

    def __init__(self, entry: str = "rows") -> None:
        self.formula = FORMULAS[entry]


class ChunkedEager(Provider):
    """Rows in chunks, so that temporaries stay small; sums of rows are differentiated chunk by chunk at once."""

    def __init__(self, entry: str = "rows", chunk_bytes: int = CHUNK_BYTES) -> None:
        self.name, self._entry, self._bytes = f"eager, {chunk_bytes // 2**20} MiB chunks", entry, chunk_bytes

    def _size(self, inputs: list[Tensor]) -> int:
        q_means = inputs[{"self": 0, "log_prob": 1}.get(self._entry, 2)]
        k = {"self": 0, "log_prob": 1}.get(self._entry, 2)
        return max(1, self._bytes // (q_means.itemsize * max(t.numel() for t in inputs[k : k + 2])))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return FORMULAS[self._entry](*inputs, rows=rows_in_chunks(self._size(inputs)))

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        if self._entry != "rows":
            return super().forward_backward(inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        mu, s, *q = leaves
        size, total = self._size(inputs), [torch.zeros_like(x) for x in inputs]
        for i in range(0, len(mu), size):
            value = rows(mu[i : i + size], s if len(s) == 1 else s[i : i + size], *q).sum()
            for sums, grad in zip(total, torch.autograd.grad(value, leaves), strict=True):
                sums += grad
        return total


class Compiled(Provider):
    name, bytes_per_element = "torch.compile", BYTES_PER_ELEMENT

    def __init__(self, entry: str = "rows") -> None:
        self.formula = torch.compile(FORMULAS[entry] if entry != "rows" else rows, dynamic=False)


def _rows_and_weights(mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    logits = log_b + pairs(mu, s, nu, t)
    lse = torch.logsumexp(logits, -1)
    return lse, (logits - lse[:, None]).exp()


def _pair_gradients(r: Tensor, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    u = (mu[:, None] - nu) / (s[:, None] + t)
    return (r[..., None] * u).sum(dim), 0.5 * (r[..., None] * (u * u - 1.0 / (s[:, None] + t))).sum(dim)


class HandDerived(Compiled):
    """Gradients derived by hand, compiled: what an expert gets without writing a kernel; stores (N, M) weights."""

    name, bytes_per_element = "torch.compile, hand-derived gradients", 0

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


class Textbook(Provider):
    """Loops over components, as public implementations of the regularizer have them."""

    name = "loop over components"

    def formula(self, mu: Tensor, s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
        def log_normal(mean: Tensor, variance: Tensor, other: Tensor) -> Tensor:
            return -0.5 * ((other - mean) ** 2 / variance + variance.log() + LOG_2PI).sum(-1)

        k = range(len(nu))
        cross = torch.stack([log_b[j] + log_normal(nu[j], s + t[j], mu) for j in k]).logsumexp(0)
        own = -0.5 * (torch.log(2.0 * s) + LOG_2PI).sum(-1)
        prior = torch.stack([log_b[i] + log_b[j] + log_normal(nu[j], t[i] + t[j], nu[i]) for i in k for j in k])
        return -cross + 0.5 * own + 0.5 * prior.logsumexp(0)


class ScikitLearn(Provider):
    """GaussianMixture.score_samples: densities at points, no gradients."""

    name, backward, pause = "scikit-learn, score_samples", False, 0.05  # OpenBLAS: 2^26 cycles

    def forward(self, inputs: list[Tensor]) -> Tensor:
        from sklearn.mixture import GaussianMixture

        x, nu, t, log_b = inputs
        model = GaussianMixture(len(nu), covariance_type="diag")
        model.means_, model.covariances_, model.weights_ = nu.numpy(), t.numpy(), log_b.exp().numpy()
        model.precisions_cholesky_ = 1.0 / model.covariances_**0.5
        return torch.from_numpy(model.score_samples(x.numpy()))


class TorchDistributions(Provider):
    """MixtureSameFamily.log_prob, points in chunks, whose sums are differentiated at once."""

    name = f"torch.distributions, {CHUNK_BYTES // 2**20} MiB chunks"

    def _chunks(self, inputs: list[Tensor]) -> Iterator[Tensor]:
        from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

        x, nu, t, log_b = inputs
        size = max(1, CHUNK_BYTES // (nu.itemsize * nu.numel()))
        for chunk in x.split(size):
            components = Independent(Normal(nu, t.sqrt(), validate_args=False), 1)
            density = MixtureSameFamily(Categorical(logits=log_b), components, validate_args=False)
            yield density.log_prob(chunk) + log_b.logsumexp(-1)  # which it subtracts: weights are used as given

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return torch.cat(list(self._chunks(inputs)))

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        for value in self._chunks(leaves):
            value.sum().backward()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def providers(case: Case) -> list[Provider]:
    """csdiv's native CPU backend, and every peer that is installed and offers the case."""
    entry = case.entry
    found: list[Provider] = [Csdiv("cpu", entry), ChunkedEager(entry)]
    if case.m < 100_000 and case.structure != "full":
        found.append(Compiled(entry))
    if entry == "rows" and case.structure == "diagonal" and case.m < 100_000:
        found.append(HandDerived())
        if installed("pykeops"):
            found.append(KeOps())
    if entry == "regularizer" and case.m <= 10:
        found.append(Textbook())
    if entry == "log_prob":
        found.append(TorchDistributions())
        if installed("sklearn"):
            found.append(ScikitLearn())
    return found
