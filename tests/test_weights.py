"""Linear weights, and self terms that are known before."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

F64 = torch.float64
WEIGHTS = torch.tensor([0.5, 0.0, 0.2, 0.0], dtype=F64)
X = torch.linspace(-1.0, 1.0, 10, dtype=F64).view(5, 2)
Q = testing.random_mixture(3, 2, dtype=F64, generator=torch.Generator().manual_seed(1))

FUNCTIONS: dict[str, Callable[[GaussianMixture], Tensor]] = {
    "cs_divergence": lambda p: csdiv.cs_divergence(p, Q),
    "cs_divergence of q": lambda p: csdiv.cs_divergence(Q, p),
    "cs_divergence with known terms": lambda p: csdiv.cs_divergence(p, Q, q_self_overlap=csdiv.log_overlap(Q)),
    "log_overlap": lambda p: csdiv.log_overlap(Q, p),
    "self overlap": csdiv.log_overlap,
    "log_prob": lambda p: p.log_prob(X),
    "component_log_overlap": lambda p: csdiv.component_log_overlap(Q, p),
    "ise": lambda p: csdiv.ise(p, Q),
    "nise": lambda p: csdiv.nise(Q, p),
    "mmd2": lambda p: csdiv.mmd2(p, Q, 0.7),
    "cosine_similarity": lambda p: csdiv.cosine_similarity(p, Q),
    "cs_regularizer": lambda p: csdiv.cs_regularizer(X, 0.1 * X, p),
    "normalized": lambda p: csdiv.log_overlap(p.normalized(), Q),
}
SPREADS = {
    "diagonal": ("variances", (4, 2)),
    "spherical": ("variances", (4, 1)),
    "tied diagonal": ("variances", (1, 2)),
    "full": ("scale_tril", (4, 2, 2)),
    "tied full": ("factor", (1, 2, 2)),
}


def mixture(structure: str, weights: Tensor) -> GaussianMixture:
    g = torch.Generator().manual_seed(0)
    name, shape = SPREADS[structure]
    spread = 0.3 * torch.rand(shape, generator=g, dtype=F64) + (0.5 if name == "variances" else torch.eye(2, dtype=F64))
    return GaussianMixture(torch.randn(4, 2, generator=g, dtype=F64), weights=weights, **{name: spread})


@pytest.mark.parametrize("structure", SPREADS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_to_a_weight_of_zero_is_the_derivative(name: str, structure: str) -> None:
    """On plain autograd, in torch.func and forwards, against one-sided differences."""
    if name == "cs_regularizer" and "full" in structure:
        structure = "diagonal"

    def total(weights: Tensor) -> Tensor:
        return FUNCTIONS[name](mixture(structure, weights)).sum()

    leaf = WEIGHTS.clone().requires_grad_()
    value = total(leaf)
    assert torch.equal(value, total(WEIGHTS))
    (grad,) = torch.autograd.grad(value, leaf)
    step = 1e-5
    differences = torch.stack(
        [
            (-3.0 * total(WEIGHTS) + 4.0 * total(WEIGHTS + step * one) - total(WEIGHTS + 2.0 * step * one))
            / (2.0 * step)
            for one in torch.eye(4, dtype=F64)
        ]
    )
    torch.testing.assert_close(grad, differences, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.func.grad(total)(WEIGHTS), grad)
    tangent = torch.tensor([0.0, 1.0, 0.0, -2.0], dtype=F64)
    torch.testing.assert_close(torch.func.jvp(total, (WEIGHTS,), (tangent,))[1], grad @ tangent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_weights_are_used_as_given(dtype: torch.dtype) -> None:
    weights = torch.tensor([0.5, 0.25, 2.0], dtype=dtype)
    p = testing.random_mixture(3, 2, dtype=dtype)
    linear = GaussianMixture(p.means, p.variances, weights=weights)
    assert torch.equal(linear.log_weights, weights.to(linear.log_weights.dtype).log())
    assert linear.log_weights.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    logs = GaussianMixture(p.means, p.variances, log_weights=linear.log_weights)
    assert torch.equal(csdiv.log_overlap(linear), csdiv.log_overlap(logs))
    torch.testing.assert_close(linear.normalized().weights.sum(), torch.ones((), dtype=linear.weights.dtype))
    torch.testing.assert_close(linear.normalized().log_weights, logs.normalized().log_weights)


def test_a_weight_of_zero_hides_its_component() -> None:
    """Bits of the value, and gradients that are finite, whatever its parameters; the rest is as without it."""
    p = testing.random_mixture(4, 2, dtype=F64)
    spoilt = p.means.clone()
    spoilt[1] = math.nan
    weights = WEIGHTS.clone().requires_grad_()
    bad = GaussianMixture(spoilt.requires_grad_(), p.variances, weights=weights)
    kept = [0, 2, 3]
    good = GaussianMixture(p.means[kept], p.variances[kept], weights=WEIGHTS[kept])
    for name, function in FUNCTIONS.items():
        torch.testing.assert_close(function(bad), function(good), rtol=1e-14, atol=1e-14)
        grads = torch.autograd.grad(function(bad).sum(), [bad.means, weights], retain_graph=True)
        assert all(bool(g.isfinite().all()) for g in grads)
        assert name == "normalized" or grads[1][1] == 0.0
        assert grads[1][3] != 0.0


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_weights_that_are_none(bad: float) -> None:
    means, one = torch.zeros(3, 2), torch.ones(1, 1)
    weights = torch.tensor([0.2, bad, 0.3])
    assert csdiv.log_overlap(GaussianMixture(means, one, weights=weights)).isnan()
    with pytest.raises(ValueError, match=r"weights: finite values >= 0 expected, got .* at index \(1,\)"):
        GaussianMixture(means, one, weights=weights, validate=True)
    with pytest.raises(ValueError, match=r"weights: \(\*batch, K\) with K = 3 expected, got \(2,\)"):
        GaussianMixture(means, one, weights=weights[:2])
    with pytest.raises(ValueError, match="got weights and logits"):
        GaussianMixture(means, one, weights=weights, logits=weights)


def test_validate_notices_probabilities_in_place_of_log_weights() -> None:
    means, one = torch.zeros(2, 3, 2), torch.ones(1, 1)
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="log_weights: logarithms expected, got values >= 0 that sum to 1"):
        GaussianMixture(means, one, log_weights=probabilities, validate=True)
    GaussianMixture(means, one, log_weights=probabilities.log(), validate=True)
    GaussianMixture(means, one, log_weights=2.0 * probabilities, validate=True)
    with pytest.raises(TypeError, match="positional"):
        GaussianMixture(means, one, probabilities)


@pytest.mark.parametrize("structure", ["diagonal", "full"])
@pytest.mark.parametrize("function", [csdiv.cs_divergence, csdiv.ise, csdiv.nise])
def test_known_self_terms_stand_for_their_pairs(function: Callable[..., Tensor], structure: str) -> None:
    p, q = (testing.random_mixture(k, 2, batch_shape=(2,), structure=structure, dtype=F64) for k in (3, 4))
    known = {"p_self_overlap": csdiv.log_overlap(p), "q_self_overlap": csdiv.log_overlap(q)}
    expected = function(p, q)
    for some in (known, *({name: value} for name, value in known.items())):
        torch.testing.assert_close(function(p, q, **some), expected, rtol=1e-12, atol=1e-14)
    leaf = known["p_self_overlap"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(p, q, p_self_overlap=leaf).sum(), leaf)
    assert bool((grad != 0.0).all())
    with pytest.raises(ValueError, match="batch shapes that broadcast expected"):
        function(p, q, p_self_overlap=torch.zeros(3))
    with pytest.raises(TypeError, match="q_self_overlap: floating point expected"):
        function(p, q, q_self_overlap=torch.zeros(2, dtype=torch.int64))


def test_a_known_self_term_costs_no_pairs() -> None:
    """The kernels of the self terms do not run."""
    p, q = testing.random_mixture(3, 2), testing.random_mixture(4, 2)
    known = csdiv.log_overlap(q)
    with torch.profiler.profile() as profile:
        csdiv.cs_divergence(p, q, p_self_overlap=csdiv.log_overlap(p).detach(), q_self_overlap=known)
    names = [event.name for event in profile.events()]
    assert sum("self_overlap" in name for name in names) == 1
    assert not any("cs_divergence" in name for name in names)
