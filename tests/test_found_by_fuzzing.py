"""Faults that tests/fuzz.py found, each with the value that is right."""

import copy
import math

import pytest
import torch
from entries import BACKENDS, WITH_FULL

import csdiv
from csdiv import GaussianMixture, testing

F64 = torch.float64
NOTHING = torch.tensor([-math.inf])


@pytest.mark.parametrize("backend", WITH_FULL)
def test_an_empty_tied_overlap_has_no_gradients(backend: str) -> None:
    """Not through the determinant of its covariance either."""
    factor = torch.eye(2).unsqueeze(0).requires_grad_()
    p = GaussianMixture(torch.zeros(1, 2), scale_tril=factor, log_weights=NOTHING)
    x = torch.zeros(3, 2)
    for value in (csdiv.log_overlap(p, backend=backend), p.log_prob(x, backend=backend)):
        assert bool((value == -math.inf).all())
        (grad,) = torch.autograd.grad(value.sum(), factor, retain_graph=True)
        assert not grad.any()


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_zero_upstream_of_a_nan_item_that_shares_a_leaf(backend: str) -> None:
    means = torch.zeros(2, 1).requires_grad_()
    weights = torch.tensor([0.0, math.inf])
    q = GaussianMixture(torch.zeros(1, 1), torch.ones(1, 1))
    p, full = (
        GaussianMixture(means, **{name: torch.ones(shape)}, log_weights=weights)
        for name, shape in (("variances", (2, 2, 1)), ("scale_tril", (2, 2, 1, 1)))
    )
    values = csdiv.log_overlap(p, q, backend=backend), *(csdiv.log_overlap(s, backend=backend) for s in (p, full))
    for value in values:
        assert bool(value.isnan().all())
        assert not torch.autograd.grad(value, means, torch.zeros(2))[0].any()


def test_derivatives_at_weights_of_zero_leave_the_points_alone() -> None:
    means, x = torch.tensor([[0.0], [0.5]], dtype=F64), torch.zeros(1, 1, dtype=F64, requires_grad=True)
    one = torch.ones(1, 1, dtype=F64)
    weights = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    q = GaussianMixture(means, one, weights=weights)
    for value in (q.log_prob(x), csdiv.cs_regularizer(x, torch.zeros_like(x), q)):
        assert torch.autograd.grad(value.sum(), x, retain_graph=True)[0].abs().max() < 1e-16


def test_derivatives_at_weights_of_zero_under_vmap() -> None:
    means, x, one = torch.tensor([[0.0], [1.0]]), torch.zeros(1, 1), torch.ones(1, 1)
    weights = torch.tensor([[1.0, 0.0]]).requires_grad_()
    value = torch.vmap(lambda w: GaussianMixture(means, one, weights=w).log_prob(x).sum())(weights)
    (grad,) = torch.autograd.grad(value.sum(), weights)
    torch.testing.assert_close(grad, torch.tensor([[1.0, math.exp(-0.5)]]))


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_far_components_of_one_factor_are_not_squared(backend: str) -> None:
    """Further apart than whitening takes, with a factor that its product loses."""
    factor = torch.tensor([[[1.0, 0.0], [1.0, 1e-8]]], dtype=F64)
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64)
    p = GaussianMixture(means, scale_tril=factor)
    assert csdiv.log_overlap(p, backend=backend).item() == pytest.approx(15.196509, abs=1e-6)


@pytest.mark.parametrize("backend", [*WITH_FULL, "auto"])
def test_channels_of_a_batch_of_tied_covariances(backend: str) -> None:
    p = testing.random_mixture(3, 2, batch_shape=(4,), structure="tied full", dtype=F64)
    a, b = torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 3, 3, dtype=F64)
    a[:, :, 1] = -math.inf
    found = csdiv.channel_log_overlap(p, p, a, b, backend=backend)
    for c in range(2):
        for e in range(3):
            sides = [GaussianMixture(p.means, scale_tril=p.scale_tril, log_weights=w) for w in (a[:, c], b[:, e])]
            torch.testing.assert_close(found[:, c, e], csdiv.log_overlap(*sides, backend=backend))


@pytest.mark.parametrize("backend", WITH_FULL)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_absent_component_against_full_covariances(bad: float, backend: str) -> None:
    full = GaussianMixture(torch.zeros(2, 2), scale_tril=torch.eye(2).repeat(2, 1, 1))
    means = torch.tensor([[bad, 0.0], [0.0, 0.0]]).requires_grad_()
    p = GaussianMixture(means, torch.ones(2, 2), log_weights=torch.tensor([-math.inf, 0.0]))
    value = csdiv.log_overlap(p, full, backend=backend)
    assert value.isfinite()
    assert not torch.autograd.grad(value, means)[0].any()


@pytest.mark.parametrize("backend", WITH_FULL)
@pytest.mark.parametrize("bad", [math.nan, -1.0])
@pytest.mark.parametrize("form", ["variances", "scale_tril"])
def test_an_absent_side_against_a_tied_covariance(form: str, bad: float, backend: str) -> None:
    shape = (1, 1) if form == "variances" else (1, 2, 2)
    absent = GaussianMixture._unchecked(means=torch.zeros(1, 2), log_weights=NOTHING, **{form: torch.full(shape, bad)})
    means, factor = torch.zeros(3, 2, requires_grad=True), torch.eye(2).unsqueeze(0).requires_grad_()
    p = GaussianMixture(means, scale_tril=factor)
    for value in (
        csdiv.log_overlap(p, absent, backend=backend),
        csdiv.component_log_overlap(p, absent, backend=backend),
    ):
        assert bool((value == -math.inf).all())
        grads = torch.autograd.grad(value.sum(), [means, factor], retain_graph=True)
        assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("backend", WITH_FULL)
def test_empty_batches_of_tied_mixtures(backend: str) -> None:
    p = GaussianMixture(torch.zeros(0, 1, 2), scale_tril=torch.eye(2)[None])
    assert csdiv.log_overlap(p, GaussianMixture(torch.zeros(7, 2), torch.ones(1, 2)), backend=backend).shape == (0,)
    assert csdiv.log_overlap(p, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variances_that_are_expanded_over_the_batch(backend: str) -> None:
    base = torch.ones(1, 1, 1).requires_grad_()
    q, p = (
        GaussianMixture(torch.zeros(3, 2), base.expand(3, 1, 1)),
        GaussianMixture(torch.zeros(3, 2, 2), torch.ones(3, 1, 1)),
    )
    value = csdiv.log_overlap(p, q, backend=backend)
    assert value.shape == (3,)
    assert torch.autograd.grad(value.sum(), base)[0].item() == pytest.approx(-1.5)
    assert csdiv.log_overlap(
        GaussianMixture(torch.zeros(3, 2), torch.ones(1, 3, 2).expand(3, 3, 2)), backend=backend
    ).shape == (3,)


def test_weights_take_the_precision_of_the_parameters() -> None:
    weights = torch.tensor([0.1, 0.7])
    p = GaussianMixture(torch.zeros(2, 1, dtype=F64), torch.ones(1, 1, dtype=F64), weights=weights)
    assert torch.equal(p.log_weights, weights.double().log())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_regularizer_of_wide_codes_far_away(requires_grad: bool) -> None:
    """log s = 140, and a prior 1.8e18 away: as float64 has it."""
    means, log_variances = torch.zeros(1, 1), torch.full((1, 1), 140.0, requires_grad=requires_grad)
    prior = GaussianMixture(torch.full((1, 1), 1.8e18), torch.full((1, 1), 1e30))
    exact = csdiv.cs_regularizer(means.double(), log_variances.double(), prior.to(F64))
    torch.testing.assert_close(csdiv.cs_regularizer(means, log_variances, prior), exact.float(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("structure", ["full", "tied full"])
def test_nise_of_equal_mixtures_of_full_covariances(structure: str) -> None:
    p = testing.random_mixture(7, 3, structure=structure)
    p = GaussianMixture(p.means, scale_tril=p.scale_tril)
    assert csdiv.nise(p, p.map(torch.clone)).abs() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_mean_against_an_infinite_variance(backend: str) -> None:
    infinite = torch.tensor([[math.inf]])
    q = GaussianMixture(torch.zeros(1, 1), torch.ones(1, 1))
    assert csdiv.log_overlap(GaussianMixture(infinite, infinite), q, backend=backend) == -math.inf
    assert csdiv.log_overlap(GaussianMixture(infinite * math.nan, infinite), q, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, -1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_an_absent_side_of_any_variance(k: int, bad: float, backend: str) -> None:
    """In the form of one variance for all columns as well."""
    weights = torch.full((k,), -math.inf)
    q = GaussianMixture(torch.zeros(k, 2), torch.full((1, 2), bad), log_weights=weights)
    p = GaussianMixture(torch.zeros(2, 2).requires_grad_(), torch.ones(2, 2).requires_grad_())
    for value in (csdiv.log_overlap(p, q, backend=backend), csdiv.component_log_overlap(p, q, backend=backend)):
        assert bool((value == -math.inf).all())
        grads = torch.autograd.grad(value.sum(), [p.means, p.variances])
        assert not any(bool(g.any()) for g in grads)


def test_a_negative_variance_of_weight_zero_leaves_the_other_derivatives() -> None:
    means, variances = torch.zeros(3, 1), torch.tensor([[1.0], [1.0], [-1.0]])
    p = GaussianMixture(means[:1], variances[:1])

    def value(weights: torch.Tensor) -> torch.Tensor:
        return csdiv.log_overlap(p, GaussianMixture(means, variances, weights=weights))

    weights = torch.tensor([1.0, 0.0, 0.0]).requires_grad_()
    expected = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(torch.autograd.grad(value(weights), weights)[0], expected)
    torch.testing.assert_close(torch.func.vjp(value, weights.detach())[1](torch.tensor(1.0))[0], expected)


def test_regularizer_of_float64_codes_takes_a_float32_prior_in_float64() -> None:
    prior = testing.random_mixture(5, 3)
    means, log_variances = torch.randn(4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    found = csdiv.cs_regularizer(means, log_variances, prior)
    torch.testing.assert_close(found, csdiv.cs_regularizer(means, log_variances, prior.to(F64)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", WITH_FULL)
def test_channels_of_factors_far_apart(backend: str) -> None:
    p = GaussianMixture(torch.tensor([[0.0, 0.0], [1e6, 0.0]], dtype=F64), scale_tril=torch.eye(2, dtype=F64)[None])
    a = torch.zeros(2, 2, dtype=F64)
    found = csdiv.channel_log_overlap(p, p, a, a, backend=backend)
    torch.testing.assert_close(found, csdiv.log_overlap(p).expand(2, 2) + 2.0 * math.log(2.0))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dim", [2, 40])
@pytest.mark.parametrize("structure", ["diagonal", "points", "tied full"])
def test_several_covariances_against_one_in_batches(structure: str, dim: int, backend: str) -> None:
    """In the order of the batch, and each component without weight with its own covariance."""
    p = testing.random_mixture(4, dim, batch_shape=(2, 2), structure="full", dtype=F64)
    q = testing.random_mixture(5, dim, batch_shape=(2, 2), structure=structure, dtype=F64)
    q = q if structure != "diagonal" else GaussianMixture(q.means, q.variances[..., :1, :], log_weights=q.log_weights)
    p.log_weights[..., 1] = -math.inf
    for entry in ("log_overlap", "component_log_overlap", "pairwise_log_overlap"):
        for sides in ((p, q), (q, p)):
            found = getattr(csdiv, entry)(*sides, backend=backend)
            torch.testing.assert_close(found, testing.eager(entry, *sides), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_variances_of_zero_are_points_to_a_factor(shape: tuple[int, int], backend: str) -> None:
    factor = torch.tensor([[[1.0, 0.0], [1.0, 1e-9]]], dtype=F64)
    x = GaussianMixture(torch.zeros(3, 2, dtype=F64), torch.zeros(shape, dtype=F64))
    for k in (1, 3):
        q = GaussianMixture(torch.zeros(k, 2, dtype=F64), scale_tril=factor.repeat(k, 1, 1))
        found = csdiv.component_log_overlap(x, q, backend=backend)
        assert found.tolist() == pytest.approx([18.885388770537] * 3, rel=1e-12)


def test_gradients_to_variances_beside_a_factor() -> None:
    """Of S = s I and T = R Rᵀ, also at s = 0, which square roots have no derivative at."""
    factor = torch.tensor([[[1.0, 0.0], [0.5, 0.7]]], dtype=F64)
    q = GaussianMixture(torch.zeros(2, 2, dtype=F64), scale_tril=factor)
    wide = GaussianMixture(q.means, covariance_matrix=factor @ factor.mT)
    for s in (0.0, 0.3):
        leaf = torch.full((1, 1), s, dtype=F64, requires_grad=True)
        p = GaussianMixture(torch.ones(1, 2, dtype=F64), leaf)
        grads = [torch.autograd.grad(csdiv.log_overlap(p, side), leaf)[0] for side in (q, wide)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "tied full", "full"])
def test_derivatives_of_responsibilities_at_weights_of_zero(structure: str) -> None:
    p = testing.random_mixture(4, 2, structure=structure, dtype=F64, generator=torch.Generator().manual_seed(1))
    x, given = torch.randn(3, 2, dtype=F64), torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=F64)
    spread = {"variances": p.variances} if p.variances is not None else {"scale_tril": p.scale_tril}

    def value(weights: torch.Tensor) -> torch.Tensor:
        shares = GaussianMixture(p.means, weights=weights, **spread).responsibilities(x)
        return (shares * torch.arange(12, dtype=F64).view(3, 4).cos()).sum()

    (grad,) = torch.autograd.grad(value(given.requires_grad_()), given)
    step, given = 1e-5, given.detach()
    for k in range(4):
        one = step * torch.eye(4, dtype=F64)[k]
        difference = (-3.0 * value(given) + 4.0 * value(given + one) - value(given + 2.0 * one)) / (2.0 * step)
        assert grad[k].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-7)


def test_a_mixture_is_an_argument_of_torch_func() -> None:
    """Its gradient is a mixture; tensors that were not given are no leaves."""
    p = testing.random_mixture(3, 2, dtype=F64)
    found = torch.func.grad(csdiv.log_overlap)(p)
    leaves = p.map(lambda t: t.clone().requires_grad_())
    expected = torch.autograd.grad(csdiv.log_overlap(leaves), leaves._tensors())
    torch.testing.assert_close(found._tensors(), list(expected))


def test_deepcopy_of_linear_weights_that_want_gradients() -> None:
    weights = torch.tensor([0.5, 0.0], requires_grad=True)
    p = GaussianMixture(torch.zeros(2, 1), torch.ones(1, 1), weights=weights)
    copied = copy.deepcopy(p)
    assert torch.equal(copied.weights, weights)
    assert copied.weights is not weights
    (grad,) = torch.autograd.grad(csdiv.log_overlap(copied), copied.weights)
    torch.testing.assert_close(grad, torch.autograd.grad(csdiv.log_overlap(p), weights)[0])


def test_an_infinite_log_weight_makes_responsibilities_nan() -> None:
    p = GaussianMixture(torch.zeros(2, 2), torch.ones(2, 2), log_weights=torch.tensor([0.0, math.inf]))
    assert bool(p.responsibilities(torch.zeros(1, 2)).isnan().all())


def test_components_without_weight_do_not_set_the_scale() -> None:
    """Of float32 sums on the CPU, by their variances: errors are as without them."""
    g = torch.Generator().manual_seed(0)
    p = GaussianMixture(torch.randn(40, 64, generator=g), torch.rand(40, 64, generator=g) + 0.5)
    means, variances = torch.randn(8, 64, generator=g), torch.rand(8, 64, generator=g) + 0.5
    log_weights = torch.zeros(8)
    log_weights[3:] = -math.inf
    variances[3:] = 1e30
    q = GaussianMixture(means, variances, log_weights=log_weights)
    kept = GaussianMixture(means[:3], variances[:3], log_weights=log_weights[:3])
    for function in (csdiv.component_log_overlap, csdiv.cs_divergence):
        torch.testing.assert_close(function(p, q, backend="cpu"), function(p, kept, backend="cpu"), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_empty_item_beside_others_of_one_variance(dtype: torch.dtype) -> None:
    """All items have one scale, also one without any weight."""
    p = testing.random_mixture(16, 5, structure="spherical", dtype=dtype)
    weights = torch.tensor([[-math.inf], [-1.3], [0.2]], dtype=dtype)
    q = GaussianMixture(torch.zeros(3, 1, 5, dtype=dtype), torch.full((1, 1), 0.07, dtype=dtype), log_weights=weights)
    found, expected = (csdiv.component_log_overlap(p, q, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", ["scale_tril", "factor", "covariance_matrix"])
def test_padding_of_weight_zero_may_have_any_covariance(form: str) -> None:
    matrices = torch.stack([torch.eye(2), torch.zeros(2, 2)])
    weights = torch.tensor([1.0, 0.0])
    p = GaussianMixture(torch.zeros(2, 2), weights=weights, **{form: matrices})
    assert csdiv.log_overlap(p).item() == pytest.approx(-math.log(4.0 * math.pi))
    with pytest.raises(ValueError, match=rf"{form}: .* component \(1,\)"):
        GaussianMixture(torch.zeros(2, 2), **{form: matrices})


def test_compile_takes_one_tensor_on_both_sides() -> None:
    means, variances = torch.randn(3, 2).requires_grad_(), torch.rand(3, 2) + 0.5
    q = testing.random_mixture(4, 2)

    def value(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        p = GaussianMixture(m, v)
        return csdiv.cs_divergence(p, GaussianMixture(q.means, v[:1])) + csdiv.ise(p, p) + p.log_prob(m).sum()

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    found, expected = compiled(means, variances), value(means, variances)
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(v, means)[0] for v in (found, expected))
    torch.testing.assert_close(*grads)
