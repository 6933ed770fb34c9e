"""Providers: csdiv and what it replaces, each with ``forward`` and ``forward_backward`` of an entry's sum.

forward returns the values of :mod:`bench.formulas`, forward_backward the gradients to all inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import hand_derived
from .cases import DIRECTIONS, SMALL_CASES, Case
from .formulas import FORMULAS, LOG_2PI, LOG_4PI, Formula, is_full, rows, rows_in_chunks, with_csdiv

CHUNK_BYTES = 2 * 2**20  # the fastest eager chunk on CPUs: temporaries stay in the cache
BYTES_PER_ELEMENT = 12
"""Of what autograd keeps of an (N, M, D) computation in float32."""
UNCHUNKED = 2**24
"""Elements up to which the eager formula is tried as it stands."""


def leaves_of(inputs: list[Tensor]) -> list[Tensor]:
    """The inputs as leaves that gradients are asked for; those that are such leaves already stay."""
    return [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]


class Provider:
    """One way to compute an entry; subclasses set ``name`` and ``formula``, or override what differs."""

    name = ""
    formula: Formula
    directions: tuple[str, ...] = DIRECTIONS  # those that it offers
    computes = True  # whether it returns what the formula does
    bytes_per_element = 0  # temporaries of forward_backward
    pause = 0.01
    """Seconds for which threads spin after a call, in wait for the next: others would find no processor free. Those of
    GNU's OpenMP library take about 5 ms, and torch, KeOps and what torch.compile builds have one each."""

    def forward(self, inputs: list[Tensor]) -> Tensor:
        return self.formula(*inputs)

    def values(self, inputs: list[Tensor]) -> list[Tensor]:
        """What ``forward`` returns, in a list as gradients are."""
        return [self.forward(inputs)]

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = leaves_of(inputs)
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
        leaves = leaves_of(inputs)
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


class HandDerived(Provider):
    """Gradients derived by hand, compiled: what an expert gets without writing a kernel; stores (N, M) weights.

    The first call times the ways to compile them, one graph and one for each stage, and keeps the faster.
    """

    name = "torch.compile, hand-derived gradients"

    def __init__(self, entry: str = "rows", structure: str = "diagonal") -> None:
        plain = hand_derived.of(entry, structure)
        compiled = functools.partial(torch.compile, dynamic=False)
        self.formula = compiled(lambda *x: plain(hand_derived.Stages(), *x)[0])  # the compiler leaves gradients out
        self._ways: list[Callable[..., hand_derived.Gradients]] = [
            compiled(lambda *x: plain(hand_derived.Stages(), *x))
        ]
        if plain in hand_derived.STAGED:
            stages = hand_derived.Stages(*map(compiled, hand_derived.Stages()))
            self._ways.append(functools.partial(plain, stages))

    def _choose(self, inputs: Sequence[Tensor]) -> None:
        if inputs[0].shape[-2] * inputs[-1].numel() * inputs[0].shape[-1] > UNCHUNKED:
            del self._ways[0]  # one graph may store (N, M, D) arrays
        for way in self._ways:
            way(*inputs)
        if len(self._ways) > 1:
            self._ways = [min(self._ways, key=lambda way: min(_seconds(way, inputs) for _ in range(5)))]

    @torch.no_grad()
    def _together(self, inputs: Sequence[Tensor]) -> hand_derived.Gradients:
        if len(self._ways) > 1:
            self._choose(inputs)
        return self._ways[0](*inputs)

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._together(inputs)[1]


def _seconds(way: Callable[..., object], inputs: Sequence[Tensor]) -> float:
    begin = time.perf_counter()
    way(*inputs)
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


class EagerHandDerived(Eager):
    """The same gradients without a compiler."""

    name, directions = "eager, hand-derived gradients", DIRECTIONS[1:]

    def __init__(self, entry: str = "rows", structure: str = "diagonal") -> None:
        self._together = functools.partial(hand_derived.of(entry, structure), hand_derived.Stages())

    @torch.no_grad()
    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._together(*inputs)[1]


class HandDerivedFunction(HandDerived):
    """The same as a function that autograd can differentiate, as a training step needs it."""

    name, directions = "torch.compile, hand-derived gradients in a Function", DIRECTIONS[1:]

    def __init__(self, entry: str = "rows", structure: str = "diagonal") -> None:
        super().__init__(entry, structure)
        together = self._together

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                values, gradients = together(inputs)
                ctx.save_for_backward(*gradients)
                return values.sum()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Any:
                return tuple(torch._foreach_mul(ctx.saved_tensors, grad))

        self._apply = Function.apply

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = leaves_of(inputs)
        return list(torch.autograd.grad(self._apply(*leaves), leaves))


class Nothing(torch.autograd.Function):
    """What torch itself takes for a function of several tensors with all their gradients."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


class Floor(Provider):
    """No peer: what any call with gradients costs that takes one node of autograd."""

    name, directions, computes = "torch.autograd.Function that computes nothing", DIRECTIONS[1:], False

    def forward_backward(self, inputs: list[Tensor]) -> list[Tensor]:
        leaves = leaves_of(inputs)
        return list(torch.autograd.grad(Nothing.apply(*leaves), leaves))


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

    def formula(self, mu: Tensor, log_s: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
        def log_normal(mean: Tensor, variance: Tensor, other: Tensor) -> Tensor:
            return -0.5 * ((other - mean) ** 2 / variance + variance.log() + LOG_2PI).sum(-1)

        k, s = range(len(nu)), log_s.exp()
        cross = torch.stack([log_b[j] + log_normal(nu[j], s + t[j], mu) for j in k]).logsumexp(0)
        own = -0.5 * (log_s + LOG_4PI).sum(-1)
        prior = torch.stack([log_b[i] + log_b[j] + log_normal(nu[j], t[i] + t[j], nu[i]) for i in k for j in k])
        return -cross + 0.5 * own + 0.5 * prior.logsumexp(0)


class ScikitLearn(Provider):
    """GaussianMixture.score_samples: densities at points, no gradients."""

    name, directions = "scikit-learn, score_samples", DIRECTIONS[:1]
    pause = 0.05  # OpenBLAS: 2^26 cycles

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
        leaves, sums = leaves_of(inputs), list[Tensor]()
        for value in self._chunks(leaves):
            found = list(torch.autograd.grad(value.sum(), leaves))
            sums = [a.add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
        return sums


class TorchDistributionsPointwise(Provider):
    """MixtureSameFamily.log_prob of a batch of mixtures, one point each."""

    name = "torch.distributions"

    def formula(self, x: Tensor, nu: Tensor, t: Tensor, log_b: Tensor) -> Tensor:
        from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

        if is_full(nu, t):
            components: Any = MultivariateNormal(nu, scale_tril=t.tril(), validate_args=False)
        else:
            components = Independent(Normal(nu, t.sqrt(), validate_args=False), 1)
        density = MixtureSameFamily(Categorical(logits=log_b), components, validate_args=False)
        return density.log_prob(x) + log_b.logsumexp(-1)  # as in TorchDistributions


@functools.cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def providers(case: Case) -> list[Provider]:
    """csdiv's native CPU backend, and every peer that is installed and offers the case."""
    entry = case.entry
    found: list[Provider] = [Csdiv("cpu", entry)]
    if case.elements <= UNCHUNKED and (case.structure != "full" or entry == "pointwise"):
        found.append(Eager(entry))
    if entry != "pointwise" and (case.structure == "full" or 4 * case.elements > CHUNK_BYTES):
        found.append(ChunkedEager(entry))
    if case.m < 100_000 and (case.structure != "full" or entry == "pointwise"):
        found.append(Compiled(entry))
    if case.m < 100_000 and (entry == "pointwise" or case.structure != "full"):
        found.append(HandDerived(entry, case.structure))
        if case.elements <= UNCHUNKED or entry == "log_prob" or case.structure != "diagonal":
            found.append(EagerHandDerived(entry, case.structure))
    if entry == "rows" and case.structure == "diagonal" and case.m < 100_000 and installed("pykeops"):
        found.append(KeOps())
    if entry == "regularizer" and case.m <= 10:
        found.append(Textbook())
    if entry == "log_prob":
        found.append(TorchDistributions())
        if installed("sklearn"):
            found.append(ScikitLearn())
    if entry == "pointwise":
        found.append(TorchDistributionsPointwise())
    if case in SMALL_CASES:
        found += [HandDerivedFunction(entry, case.structure), Floor()]
    return found
