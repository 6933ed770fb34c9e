"""One point for each mixture of a batch, and batches of problems that have one row each."""

import math

import pytest
import torch
from entries import BACKENDS
from mixtures import STRUCTURES
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import csdiv
from csdiv import GaussianMixture, testing

F64 = torch.float64


def density(p: GaussianMixture, x: Tensor) -> Tensor:
    """As testing has it, in plain torch."""
    return testing.eager("log_prob", csdiv.functional.points(x.unsqueeze(-2)), p).squeeze(-1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("batches", [((), ()), ((5,), (5,)), ((40,), (40,)), ((), (5,)), ((5,), ()), ((3, 1), (1, 4))])
def test_pointwise_log_prob(batches: tuple[tuple[int, ...], tuple[int, ...]], structure: str) -> None:
    """Values and gradients, for any way in which both batches broadcast."""
    g = torch.Generator().manual_seed(0)
    p = testing.random_mixture(7, 3, batch_shape=batches[0], structure=structure, dtype=F64, generator=g)
    x = torch.randn(*batches[1], 3, generator=g, dtype=F64)
    leaves = [t.detach().requires_grad_() for t in (x, *p._tensors())]
    fields = iter(leaves[1:])
    p = p.map(lambda t: next(fields))
    found, expected = p.pointwise_log_prob(leaves[0]), density(p, leaves[0])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.shape, generator=g, dtype=F64)
    grads, expected_grads = (torch.autograd.grad(v, leaves, upstream, retain_graph=True) for v in (found, expected))
    for name, a, b in zip(("x", *csdiv.mixture.EVENT_DIMS), grads, expected_grads, strict=False):
        lower = b.tril() if name == "scale_tril" else b
        torch.testing.assert_close(a, lower, rtol=1e-9, atol=1e-11)


def test_pointwise_log_prob_is_that_of_torch() -> None:
    means, scales, logits = torch.randn(50, 4, 2), torch.rand(50, 4, 2) + 0.1, torch.randn(50, 4)
    network = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, scales), 1))
    x = torch.randn(50, 2)
    p = GaussianMixture.from_distribution(network)
    assert p.log_prob(x).shape == (50, 50)
    torch.testing.assert_close(p.pointwise_log_prob(x), network.log_prob(x))
    torch.testing.assert_close(p.pointwise_log_prob(x), p.log_prob(x).diagonal())


def test_pointwise_log_prob_refuses() -> None:
    p = testing.random_mixture(4, 3, batch_shape=(5,))
    with pytest.raises(ValueError, match=r"x: \(\*batch, D\) with D = 3 expected, got \(5, 2\)"):
        p.pointwise_log_prob(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"batch shapes that broadcast expected, got \(4,\) in x and \(5,\) in p"):
        p.pointwise_log_prob(torch.zeros(4, 3))
    assert p.pointwise_log_prob(torch.zeros(3)).shape == (5,)
    assert testing.random_mixture(4, 3, batch_shape=(0,)).pointwise_log_prob(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [(16, 1, 1), (17, 3, 2), (40, 20, 16), (33, 9, 33), (20, 70, 15)])
def test_one_row_for_each_problem_is_within_the_budget(
    size: tuple[int, int, int], dtype: torch.dtype, backend: str
) -> None:
    """As many problems as a vector has lanes, fewer in the last group, and more numbers than the lanes take."""
    batch, m, dim = size
    g = torch.Generator().manual_seed(batch)
    p, q = (testing.random_mixture(k, dim, batch_shape=(batch,), decades=1.0, dtype=dtype, generator=g) for k in (1, m))
    wide = [side.to(F64).map(lambda t: t.requires_grad_()) for side in (p, q)]
    narrow = [side.map(lambda t: t.requires_grad_()) for side in (p, q)]
    leaves, exact_leaves = ([s[0].means, s[0].variances, *s[1]._tensors()] for s in (narrow, wide))
    upstream = torch.randn(batch, 1, generator=g, dtype=dtype)
    found = csdiv.component_log_overlap(*narrow, backend=backend)
    eager = testing.eager("component_log_overlap", *narrow)
    exact = testing.eager("component_log_overlap", *wide)
    testing.assert_within_budget(found, eager, exact, testing.band("component_log_overlap", *wide, dtype=dtype))
    bands = testing.gradient_bands("component_log_overlap", *wide, upstream, exact_leaves, dtype=dtype)
    grads = [
        torch.autograd.grad(value, inputs, upstream.to(value.dtype))
        for value, inputs in ((found, leaves), (eager, leaves), (exact, exact_leaves))
    ]
    for a, e, x, band in zip(*grads, bands, strict=True):
        testing.assert_within_budget(a, e, x, band)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_of_problems_that_lanes_cannot_take(dtype: torch.dtype) -> None:
    """An infinite, a NaN and a far one, a zero variance and components without weight spoil their own problem alone."""
    g = torch.Generator().manual_seed(3)
    p, q = (testing.random_mixture(k, 2, batch_shape=(40,), dtype=dtype, generator=g) for k in (1, 5))
    means, variances, weights = (t.clone() for t in (q.means, q.variances, q.log_weights))
    means[3, 1] = math.nan
    means[20, 2] = 1e20
    variances[21, 0] = 0.0
    weights[22] = -math.inf
    weights[23, 1:] = -math.inf
    variances[39, 4, 0] = -1.0
    spoilt = GaussianMixture(means, variances, log_weights=weights).map(lambda t: t.requires_grad_())
    value = csdiv.component_log_overlap(p, spoilt)
    grads = torch.autograd.grad(value, spoilt._tensors(), torch.ones_like(value))
    loop = []
    for b in range(40):
        one = GaussianMixture(means[b], variances[b], log_weights=weights[b]).map(lambda t: t.requires_grad_())
        row = csdiv.component_log_overlap(GaussianMixture(p.means[b], p.variances[b]), one)
        loop.append((row, *torch.autograd.grad(row.sum(), one._tensors())))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for found, expected in zip((value, *grads), zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected), rtol=tolerance, atol=tolerance, equal_nan=True)
