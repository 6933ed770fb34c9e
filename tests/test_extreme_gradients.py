"""Gradients at the edge of a dtype's range: overflow, small and zero upstream gradients, variances as logarithms."""

import math
from collections.abc import Callable

import pytest
import torch
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

F64 = torch.float64
SCALARS: dict[str, Callable[[GaussianMixture, GaussianMixture], Tensor]] = {
    "self overlap": lambda p, q: csdiv.log_overlap(p),
    "log_overlap": csdiv.log_overlap,
    "cs_divergence": csdiv.cs_divergence,
    "ise": lambda p, q: csdiv.ise(p, q, log=True),
    "rows": csdiv.component_log_overlap,
    "log_prob": lambda p, q: p.log_prob(q.means),
    "pairwise": csdiv.pairwise_log_overlap,
}


def steep(dtype: torch.dtype) -> tuple[GaussianMixture, GaussianMixture]:
    """Variances of which a gradient overflows the dtype, by less than 10¹², in float32."""
    scale = 2e-38 if dtype == torch.float32 else 1e-307
    means = torch.tensor([[0.0], [math.sqrt(scale)]], dtype=dtype).requires_grad_()
    variances = torch.full((2, 1), scale, dtype=dtype).requires_grad_()
    p = GaussianMixture(means, variances)
    return p, GaussianMixture(means.detach() + 10.0 * math.sqrt(scale), variances.detach())


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_upstream_gradients_of_what_overflows(backend: str, name: str) -> None:
    """As float64 has them: zero gives zero, and what is representable is not infinite."""
    p, q = steep(torch.float32)
    wide_p, wide_q = (side.to(F64).map(lambda t: t.detach().requires_grad_()) for side in (p, q))
    value, exact = (SCALARS[name](*sides).sum() for sides in ((p, q), (wide_p, wide_q)))
    leaves, wide = [p.means, p.variances], [wide_p.means, wide_p.variances]
    exact_grads = torch.autograd.grad(exact, wide)
    for upstream in (0.0, 1e-6, 1e-12):
        grads = torch.autograd.grad(value, leaves, torch.tensor(upstream), retain_graph=True)
        for found, expected in zip(grads, exact_grads, strict=True):
            assert bool(found.isfinite().all())
            if upstream == 0.0:
                assert not found.any()
            else:
                scale = float(expected.abs().max()) * upstream
                torch.testing.assert_close(found.double(), expected * upstream, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_upstream_gradients_of_one_item_of_a_batch(dtype: torch.dtype) -> None:
    """An item whose gradient is infinite or NaN, weighted by zero, is out; the others are as they were."""
    p, q = (testing.random_mixture(k, 2, batch_shape=(3,), dtype=dtype) for k in (3, 4))
    variances = p.variances.clone()
    variances[1] = torch.finfo(dtype).tiny
    means = torch.where(torch.arange(3)[:, None, None] == 2, math.nan, p.means)
    leaves = [means.requires_grad_(), variances.requires_grad_()]
    spoilt = GaussianMixture(*leaves, log_weights=p.log_weights)
    for function in (csdiv.cs_divergence, csdiv.log_overlap, lambda p, q: csdiv.log_overlap(p)):
        upstream = torch.tensor([0.5, 0.0, 0.0], dtype=dtype)
        grads = torch.autograd.grad(function(spoilt, q), leaves, upstream)
        alone = GaussianMixture(*(t[0].detach().requires_grad_() for t in leaves), log_weights=p.log_weights[0])
        value = function(alone, GaussianMixture(q.means[0], q.variances[0], log_weights=q.log_weights[0]))
        expected = torch.autograd.grad(value, [alone.means, alone.variances], torch.tensor(0.5, dtype=dtype))
        for found, right in zip(grads, expected, strict=True):
            assert not found[1:].any()
            torch.testing.assert_close(found[0], right)


@pytest.mark.parametrize(
    ("log_variance", "value", "gradient"), [(-200.0, 5e19, -0.25), (-60.0, 4.9999956e19, -4.3782477e13)]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_regularizer_of_codes_and_a_prior_that_are_narrow(
    backend: str, dtype: torch.dtype, log_variance: float, value: float, gradient: float
) -> None:
    """A prior of variance 1e-20, one away: the gradient to log s is formed as a logarithm's."""
    prior = GaussianMixture(torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), 1e-20, dtype=dtype))
    log_variances = torch.full((2, 1), log_variance, dtype=dtype, requires_grad=True)
    found = csdiv.cs_regularizer(torch.ones(2, 1, dtype=dtype), log_variances, prior, backend=backend)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([value] * 2, rel=1e-6)
    (grad,) = torch.autograd.grad(found.mean(), log_variances)
    assert grad.flatten().tolist() == pytest.approx([gradient / 2.0] * 2, rel=1e-6)


def test_forward_derivatives_keep_the_dtype() -> None:
    p, q = testing.random_mixture(3, 2), testing.random_mixture(4, 2)
    full = testing.random_mixture(4, 2, structure="full")

    def moved(means: Tensor) -> GaussianMixture:
        return GaussianMixture(means, p.variances, log_weights=p.log_weights)

    functions: list[Callable[[Tensor], Tensor]] = [
        lambda m: csdiv.cs_divergence(moved(m), q),
        lambda m: csdiv.cs_divergence(moved(m), full),
        lambda m: csdiv.log_overlap(moved(m)),
        lambda m: csdiv.cosine_similarity(moved(m), q),
        lambda m: csdiv.renyi2_entropy(moved(m)),
        lambda m: csdiv.ise(moved(m), q),
        lambda m: csdiv.nise(moved(m), q),
        lambda m: csdiv.mmd2(moved(m), q, 0.5),
        lambda m: csdiv.cs_regularizer(m, m, q),
        lambda m: moved(m).log_prob(q.means),
    ]
    for function in functions:
        jacobian = torch.func.jacfwd(function)(p.means)
        assert jacobian.dtype == torch.float32
        torch.testing.assert_close(jacobian, torch.func.jacrev(function)(p.means), rtol=1e-4, atol=1e-5)
