"""Channels: several weights for the same components, against plain formulas and in one pass."""

import itertools
import math
import subprocess
import sys
from typing import Any

import emulation
import pytest
import torch
from distance_inputs import close, mixture, on_every_backend
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, reference, testing, weightings

# Channels


COSTS = {"one for all": (1, 0, 0, 2**80), "one for each": (1, 2**40, 1, 2**80)}
"""What makes each of the two ways the cheaper one."""


@pytest.fixture(params=list(COSTS))
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(weightings, "COSTS", COSTS[request.param])
    monkeypatch.setattr(weightings, "SMALL", (0, 0))
    return request.param


def value_and_gradients(p: GaussianMixture, q: GaussianMixture, a: Tensor, b: Tensor, **options: str) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (p.means, p.variances, q.means, q.variances, a, b)]
    sides = testing.mixture_of(*leaves[:2]), testing.mixture_of(*leaves[2:4])
    value = csdiv.channel_log_overlap(*sides, *leaves[4:], **options)
    upstream = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    return [value, *torch.autograd.grad(value, leaves, upstream)]


@on_every_backend
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("structure", ["diagonal", "tied spherical", "tied full", "full"])
@pytest.mark.parametrize("channels", [(2, 3), (3, 2), (1, 4)])
def test_channels_are_a_batch_of_mixtures(channels: tuple[int, int], structure: str, backend: str) -> None:
    backend = "auto" if structure == "full" else backend
    p, q = mixture(structure=structure, batch_shape=(2, 1)), mixture(7, batch_shape=(5,))
    a = torch.randn(channels[0], 4, dtype=torch.float64)
    b = torch.randn(5, channels[1], 7, dtype=torch.float64)
    a[0, 1] = b[1, 0, 2] = -math.inf
    leaves = [t.requires_grad_() for t in (p.means, q.means, q.variances, a, b)]
    found = csdiv.channel_log_overlap(p, q, a, b, backend=backend)

    def one(c: int, e: int) -> Tensor:
        weighted = (
            GaussianMixture(p.means, p.variances, log_weights=a[c], scale_tril=p.scale_tril),
            GaussianMixture(q.means, q.variances, log_weights=b[..., e, :]),
        )
        return csdiv.log_overlap(*weighted, backend="reference")

    expected = torch.stack([torch.stack([one(c, e) for e in range(channels[1])], -1) for c in range(channels[0])], -2)
    assert found.shape == (2, 5, *channels)
    close(found, expected)
    upstream = torch.randn_like(found)
    close(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_channels_in_chunks_are_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mixture(), mixture(7), *(torch.randn(c, k, dtype=torch.float64) for c, k in ((5, 4), (4, 7)))
    whole = value_and_gradients(*inputs, backend=backend)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16)
    close(value_and_gradients(*inputs, backend=backend), whole)


@pytest.mark.parametrize("backend", ["cpu", emulation.NAME])
def test_channels_go_over_the_pairs_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the value and once more for gradients, also where a batch of weights shares the components."""
    chosen, pairs = backends.resolve(backend, torch.device("cpu")), []
    plain = chosen.forward

    def counted(name: str, *arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        outputs, grads = plain(name, *arguments)
        if name == "pairwise":
            pairs.append(outputs[0].numel())
        return outputs, grads

    monkeypatch.setattr(chosen, "forward", counted)
    monkeypatch.setattr(weightings, "COSTS", (8, 28, 10_000, 2**80))
    monkeypatch.setattr(weightings, "SMALL", (0, 0))
    p, q, a, b = mixture(30, 8), mixture(50, 8), torch.randn(7, 5, 30), torch.randn(4, 50)
    with torch.no_grad():
        csdiv.channel_log_overlap(p, q, a, b, backend=backend)
    assert sum(pairs) == 30 * 50
    value_and_gradients(p, q, a, b, backend=backend)
    assert sum(pairs) == 3 * 30 * 50
    a.requires_grad_()
    csdiv.channel_log_overlap(p, q, a, b, backend=backend).sum().backward()  # of p's weights alone: rows are kept
    assert sum(pairs) == 4 * 30 * 50
    for few in ((p, q, a, b[:1]), (mixture(3, 8), q, a[..., :3], b)):  # one channel, then few pairs
        csdiv.channel_log_overlap(*few, backend=backend)
    assert sum(pairs) == 4 * 30 * 50


@on_every_backend
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("distance", [3.0, 40.0, 1000.0])
def test_channels_of_single_components_far_apart(distance: float, backend: str) -> None:
    """A channel for each component: all pairs, whose logarithms differ by up to 10⁷, with their gradients."""
    means = distance * torch.arange(6, dtype=torch.float64).unsqueeze(-1) + torch.zeros(2)
    p, q = (GaussianMixture(means + torch.rand(6, 2), torch.rand(6, 2, dtype=torch.float64) + 0.5) for _ in range(2))
    one_hot = torch.eye(6, dtype=torch.float64).log()
    found = value_and_gradients(p, q, one_hot, one_hot[:5], backend=backend)
    leaves = [t.detach().clone().requires_grad_() for t in (p.means, p.variances, q.means, q.variances)]
    pairs = csdiv.pairwise_log_overlap(
        testing.mixture_of(*leaves[:2]), testing.mixture_of(*leaves[2:]), backend="reference"
    )
    upstream = torch.linspace(-1.0, 2.0, 30, dtype=torch.float64).view(6, 5)
    close(found[0], pairs[:, :5])
    close(found[1:5], list(torch.autograd.grad(pairs[:, :5], leaves, upstream)))
    close(found[5:], [upstream.sum(-1).diag(), torch.eye(5, 6, dtype=torch.float64) * upstream.sum(0).unsqueeze(-1)])


@on_every_backend
@pytest.mark.usefixtures("passes")
def test_channels_without_weight_and_components_without_any(backend: str) -> None:
    """Padding has no gradient and spoils none, whatever stands in it; an empty channel has none either."""
    p, q = mixture(), mixture(7)
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    a[:, 1] = b[:, [2, 5]] = a[2] = b[0] = -math.inf
    expected = value_and_gradients(p, q, a, b, backend="reference")
    assert bool((expected[0][2] == -math.inf).all() & (expected[0][:, 0] == -math.inf).all())
    p.means[1], q.variances[2], q.means[5] = math.nan, -1.0, math.inf
    found = value_and_gradients(p, q, a, b, backend=backend)
    close(found, expected)
    assert not any(bool(t.any()) for t in (found[1][1], found[4][2], found[3][5], found[5][2], found[6][0]))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_channels_stay_within_the_budget(scale: float, backend: str) -> None:
    """Each pair of channels within that of a log overlap, gradients within the sum of theirs."""
    p, q = (mixture(k, 40, dtype=torch.float32) for k in (20, 30))
    p, q = (GaussianMixture(s.means * scale**0.5, s.variances * scale) for s in (p, q))
    a, b = torch.randn(3, 20), torch.randn(2, 30)
    value, *grads = value_and_gradients(p, q, a, b, backend=backend)
    leaves = [t.double().requires_grad_() for t in (p.means, p.variances, q.means, q.variances, a, b)]
    upstream, exact, bands, limits = torch.linspace(-1.0, 2.0, 6).view(3, 2), [], [], [0.0] * 6
    for c, e in itertools.product(range(3), range(2)):
        sides = testing.mixture_of(*leaves[:2], leaves[4][c]), testing.mixture_of(*leaves[2:4], leaves[5][e])
        exact.append(csdiv.log_overlap(*sides, backend="reference"))
        bands.append(testing.band("log_overlap", *sides))
        own = testing.gradient_bands("log_overlap", *sides, upstream[c, e], leaves)
        limits = [x + y for x, y in zip(limits, own, strict=True)]
    expected = torch.stack(exact).view(3, 2)
    testing.assert_within_budget(value.detach(), expected.detach(), expected.detach(), torch.stack(bands).view(3, 2))
    for g, truth, limit in zip(grads, torch.autograd.grad(expected, leaves, upstream.double()), limits, strict=True):
        testing.assert_within_budget(g, truth, truth, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [(0, 0), weightings.SMALL])
@pytest.mark.parametrize("sizes", [(403, 1900, 7, 5), (403, 512, 7, 5)])
def test_channels_are_the_same_bits_for_any_number_of_threads(
    sizes: tuple[int, ...], small: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weightings, "SMALL", small)
    monkeypatch.setattr(weightings, "COSTS", COSTS["one for all"])
    n, m, c, e = sizes
    p, q = mixture(n, 8, dtype=dtype), mixture(m, 8, dtype=dtype)
    a, b = torch.randn(c, n, dtype=dtype), torch.randn(e, m, dtype=dtype)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(value_and_gradients(p, q, a, b))
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))


def test_channels_are_as_exact_whatever_precision_of_products_torch_was_told() -> None:
    sides = mixture(300, 8, dtype=torch.float32), mixture(200, 8, dtype=torch.float32)
    inputs = *sides, torch.randn(5, 300), torch.randn(5, 200)
    expected = value_and_gradients(*inputs)
    torch.set_float32_matmul_precision("medium")
    try:
        found = value_and_gradients(*inputs)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


LARGE = """
import resource, torch, csdiv
from csdiv import testing
torch.set_num_threads(1)
def measure(n):
    p, q = (testing.random_mixture(n, 4).map(lambda t: t.requires_grad_()) for _ in range(2))
    csdiv.channel_log_overlap(p, q, torch.randn(5, n), torch.randn(6, n)).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = measure(600)
print(measure(6000) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB is Linux's")
def test_channels_take_memory_for_components_and_a_tile() -> None:
    """The inputs and their gradients, and 24 bytes for each of 2^19 pairs; all pairs would be 137 MiB in float32."""
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= (32 * 2 * 6000 * (4 + 4 + 6) * 4 + 24 * 2**19) / 1024


def test_channels_with_different_dtypes_are_promoted() -> None:
    p, q = mixture(dtype=torch.float32), mixture(7, dtype=torch.float32)
    a, b = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 7)
    found = csdiv.channel_log_overlap(p, q, a, b)
    assert found.dtype == torch.float64
    wide = p.to(torch.float64), q.to(torch.float64)
    close(found, csdiv.channel_log_overlap(*wide, a, b.double()))
    half = csdiv.channel_log_overlap(p.to(torch.bfloat16), q.to(torch.bfloat16), a.bfloat16(), b.bfloat16())
    assert half.dtype == torch.float32


@on_every_backend
@pytest.mark.usefixtures("passes")
def test_channel_of_an_undefined_weight_is_nan(backend: str) -> None:
    p, q = mixture(), mixture(7)
    a, b = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    a[0, 1], a[1, 1], b[1] = math.nan, math.inf, -math.inf
    for found in (
        csdiv.channel_log_overlap(p, q, a, b, backend=backend),
        csdiv.channel_log_overlap(q, p, b, a, backend=backend).mT,
    ):
        assert found[:2].isnan().all()
        assert found[2, 0].isfinite()
        assert found[2, 1] == -math.inf
