"""Values that make no mixture, and limits: NaN, infinite, negative, zero and absent ones."""

import math
from collections.abc import Callable

import pytest
import torch
from bad_inputs import (
    gradients_are_finite,
    mixture,
    on_every_backend,
    on_every_dtype,
    on_every_reduction,
    tensors,
    with_absent_component,
    with_gradients,
)
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

# 14–19: values that make no mixture


@on_every_backend
@on_every_dtype
@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_parameter_gives_nan(side: int, field: int, dtype: torch.dtype, backend: str) -> None:
    for where in ((1,), (-1,)):
        p, q = mixture(40, dtype=dtype), mixture(33, dtype=dtype)
        tensors((p, q)[side])[field][where] = math.nan
        assert csdiv.cs_divergence(p, q, backend=backend).isnan()
        assert csdiv.log_overlap(p, q, backend=backend).isnan()
        assert csdiv.log_overlap((p, q)[side], backend=backend).isnan()
        rows = csdiv.component_log_overlap(p, q, backend=backend)
        assert rows.isnan().all() if side == 1 else bool(rows[where[0]].isnan()) == (field < 2)
        assert side == 1 or rows.isnan().sum() == (field < 2)


@on_every_backend
@on_every_dtype
@pytest.mark.parametrize("means", [0.5, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("variances", [0.0, 2.0, -1.0, math.nan])
def test_component_without_weight_is_not_there(
    means: float, variances: float, dtype: torch.dtype, backend: str
) -> None:
    p, q = mixture(dtype=dtype), mixture(6, dtype=dtype)
    padded = [with_gradients(with_absent_component(side, 2, means=means, variances=variances)) for side in (p, q)]
    for entry in ("cs_divergence", "log_overlap"):
        value = getattr(csdiv, entry)(*padded, backend=backend)
        expected = getattr(csdiv, entry)(p, q, backend=backend)
        band = testing.band(entry, p.to(torch.float64), q.to(torch.float64), dtype=dtype, scaled=False)
        assert (value - expected).abs() <= 2.0 * band
        assert gradients_are_finite(value, *padded)
        for t in (t for side in padded for t in tensors(side)):
            (grad,) = torch.autograd.grad(value, t, retain_graph=True)
            assert not grad[2].any()
            assert grad[1].any()
    value = csdiv.log_overlap(padded[0], backend=backend)
    assert (value - csdiv.log_overlap(p, backend=backend)).abs() <= 2.0 * testing.band(
        "self_overlap", p.to(torch.float64), p.to(torch.float64), dtype=dtype, scaled=False
    )
    assert gradients_are_finite(value, padded[0])
    rows = csdiv.component_log_overlap(*padded, backend=backend)
    kept = [0, 1, 3, 4]
    assert rows[kept].isfinite().all()
    if math.isnan(means) or math.isnan(variances) or variances < 0.0:
        assert rows[2].isnan()  # its own row is
    assert padded[1].assign(padded[0].map(lambda t: t[kept]), backend=backend).ne(2).all()


@on_every_backend
@on_every_dtype
def test_a_side_without_any_weight(dtype: torch.dtype, backend: str) -> None:
    p, q = with_gradients(mixture(dtype=dtype)), mixture(5, dtype=dtype)
    q = with_gradients(GaussianMixture(q.means, q.variances, log_weights=torch.full_like(q.log_weights, -math.inf)))
    for value in (
        csdiv.log_overlap(p, q, backend=backend),
        csdiv.log_overlap(q, p, backend=backend),
        csdiv.log_overlap(q, backend=backend),
        csdiv.component_log_overlap(p, q, backend=backend),
    ):
        assert (value == -math.inf).all()
        inputs = [t for side in (p, q) for t in tensors(side)]
        grads = torch.autograd.grad(value.sum(), inputs, materialize_grads=True)
        assert not any(g.any() for g in grads)
    assert csdiv.cs_divergence(p, q, backend=backend).isnan()
    with pytest.raises(ValueError, match="log_weights: a component of positive weight expected, none in mixture"):
        testing.mixture_of(*tensors(q), validate=True)


@on_every_backend
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinite_or_undefined_weight(value: float, backend: str) -> None:
    p, q = mixture(), mixture()
    q.log_weights[1] = value
    for result in (
        csdiv.cs_divergence(p, q, backend=backend),
        csdiv.cs_divergence(q, p, backend=backend),
        csdiv.log_overlap(p, q, backend=backend),
        csdiv.log_overlap(q, p, backend=backend),
        csdiv.log_overlap(q, backend=backend),
        csdiv.component_log_overlap(p, q, backend=backend),
    ):
        assert result.isnan().all()
    with pytest.raises(ValueError, match=rf"log_weights: values below \+inf expected, got {value} at index \(1,\)"):
        testing.mixture_of(*tensors(q), validate=True)


@on_every_backend
@on_every_dtype
def test_negative_variance_gives_nan(dtype: torch.dtype, backend: str) -> None:
    """The sign of each variance counts, not that of a pair's sum, nor of a product of two."""
    p, q = mixture(1, 2, dtype=dtype), mixture(1, 2, dtype=dtype)
    for p_variances, q_variances in (((-0.5, 1.0), (2.0, 1.0)), ((-0.5, -0.5), (0.1, 0.1)), ((-1.0, 2.0), (-1.0, 2.0))):
        p = GaussianMixture(p.means, p.means.new_tensor([p_variances]))
        q = GaussianMixture(q.means, q.means.new_tensor([q_variances]))
        for function in (
            csdiv.cs_divergence,
            csdiv.log_overlap,
            csdiv.component_log_overlap,
            csdiv.pairwise_log_overlap,
        ):
            assert function(p, q, backend=backend).isnan().all()
            assert function(q, p, backend=backend).isnan().all()
        assert csdiv.log_overlap(p, backend=backend).isnan()
    with pytest.raises(ValueError, match=r"variances: values >= 0 expected, got -1.0 at index \(0, 0\)"):
        testing.mixture_of(*tensors(p), validate=True)


@on_every_backend
@pytest.mark.parametrize("position", range(9))
def test_one_negative_variance_among_many_gives_nan(position: int, backend: str) -> None:
    p, q = mixture(5, 9), mixture(20, 9)
    p.variances[position % 5, position] *= -1.0
    assert csdiv.cs_divergence(p, q, backend=backend).isnan()
    assert csdiv.component_log_overlap(p, q, backend=backend).isnan().tolist() == [i == position % 5 for i in range(5)]
    assert csdiv.component_log_overlap(q, p, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_gradients_of_the_pairs_of_a_negative_variance_are_nan(backend: str) -> None:
    """Those of the others are not; a pair that is not asked for has none."""
    p, q = mixture(5, 3), mixture(7, 3)
    p.variances[2, 1] = -0.5
    leaves = [t.requires_grad_() for t in (p.means, p.variances)]
    pairs = csdiv.pairwise_log_overlap(testing.mixture_of(*leaves), q, backend=backend)
    for grad in torch.autograd.grad(pairs.sum(), leaves, retain_graph=True):
        assert grad.isnan().any(-1).tolist() == [i == 2 for i in range(5)]
    for grad in torch.autograd.grad(pairs[3:].sum(), leaves):
        assert not grad.isnan()[[0, 1, 3, 4]].any()


@on_every_reduction
@on_every_backend
def test_values_that_make_no_mixture_of_distances(function: Callable[..., Tensor], backend: str) -> None:
    """NaN, an infinite weight and a negative variance give NaN; in a component without weight they are not there."""
    for field, value in ((0, math.nan), (1, math.nan), (1, -0.1), (2, math.nan), (2, math.inf)):
        p, q = mixture(), mixture(5)
        tensors(p)[field][1] = value
        assert function(p, q, backend=backend).isnan().all()
        assert function(q, p, backend=backend).isnan().all()
    p, q = mixture(dtype=torch.float64), mixture(6, dtype=torch.float64)
    for values in ({"means": math.nan, "variances": 1.0}, {"means": 0.5, "variances": -1.0}):
        padded = [with_gradients(with_absent_component(side, 2, **values)) for side in (p, q)]
        value = function(*padded, backend=backend)
        torch.testing.assert_close(value, function(p, q, backend=backend))
        assert gradients_are_finite(value, *padded)
        for t in (t for side in padded for t in tensors(side)):
            assert not torch.autograd.grad(value.sum(), t, retain_graph=True)[0][2].any()


@on_every_backend
def test_variance_zero_of_distances(backend: str) -> None:
    """Points are no square-integrable density: their own overlap is infinite, but not that of their convolution."""
    points, p = GaussianMixture(torch.randn(4, 3), torch.zeros(1, 1)), mixture()
    assert csdiv.ise(points, p, backend=backend) == math.inf
    assert csdiv.ise(points, p, log=True, backend=backend) == math.inf
    assert csdiv.cosine_similarity(points, p, backend=backend) == 0.0
    assert csdiv.mmd2(points, p, 1.0, backend=backend).isfinite()
    rows = csdiv.channel_log_overlap(points, p, torch.zeros(1, 4), p.log_weights[None], backend=backend)
    torch.testing.assert_close(rows.squeeze(), p.log_prob(points.means, backend=backend).logsumexp(0))


# 20–24: limits


@on_every_backend
@on_every_dtype
def test_zero_variance_is_a_point(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=dtype)
    points, p = GaussianMixture(x, torch.zeros(1, 1, dtype=dtype)), mixture(3, 2, dtype=dtype)
    assert torch.equal(csdiv.component_log_overlap(points, p, backend=backend), p.log_prob(x, backend=backend))
    pairs = csdiv.pairwise_log_overlap(points, points, backend=backend)
    assert pairs.tolist() == [[math.inf, -math.inf], [-math.inf, math.inf]]
    assert csdiv.log_overlap(points, backend=backend) == math.inf
    assert csdiv.cs_divergence(points, p, backend=backend) == math.inf
    partly = GaussianMixture(x, torch.tensor([[0.0, 1.0]], dtype=dtype))
    expected = -math.log(2.0 * math.sqrt(math.pi)) + math.inf
    pairs = csdiv.pairwise_log_overlap(partly, partly, backend=backend)
    assert pairs.tolist() == [[expected, -math.inf], [-math.inf, expected]]


@on_every_backend
@on_every_dtype
def test_infinite_variance_overlaps_with_nothing(dtype: torch.dtype, backend: str) -> None:
    p, q = mixture(dtype=dtype), mixture(5, dtype=dtype)
    wide = p.map(torch.clone)
    wide.variances[1, 0] = math.inf
    assert (csdiv.pairwise_log_overlap(wide, q, backend=backend)[1] == -math.inf).all()
    assert (csdiv.pairwise_log_overlap(q, wide, backend=backend)[:, 1] == -math.inf).all()
    without = p.map(torch.clone)
    without.log_weights[1] = -math.inf
    torch.testing.assert_close(*(csdiv.log_overlap(side, q, backend=backend) for side in (wide, without)))


@on_every_backend
@on_every_dtype
def test_means_far_apart(dtype: torch.dtype, backend: str) -> None:
    """δ² overflows: no overlap, infinite divergence, and no NaN among the gradients."""
    distance = 1e20 if dtype == torch.float32 else 1e160
    p, q = mixture(dtype=dtype), mixture(dtype=dtype)
    q = with_gradients(GaussianMixture(q.means + distance, q.variances, log_weights=q.log_weights))
    p = with_gradients(p)
    for value, expected in (
        (csdiv.log_overlap(p, q, backend=backend), -math.inf),
        (csdiv.component_log_overlap(p, q, backend=backend), -math.inf),
        (csdiv.pairwise_log_overlap(p, q, backend=backend), -math.inf),
        (csdiv.cs_divergence(p, q, backend=backend), math.inf),
        (csdiv.cs_regularizer(p.means, p.variances.log(), q, backend=backend), math.inf),
    ):
        assert (value == expected).all()
        assert gradients_are_finite(value, p, q)
    assert q.log_prob(q.means.detach() + 0.5, backend=backend).isfinite().all()


@on_every_backend
def test_one_component_far_away_changes_nothing(backend: str) -> None:
    p, q = mixture(), mixture(5)
    far = p.map(torch.clone)
    far.means[1] = 1e25
    without = p.map(torch.clone)
    without.log_weights[1] = -math.inf
    far, without = with_gradients(far), with_gradients(without)
    values = [csdiv.log_overlap(side, q, backend=backend) for side in (far, without)]
    assert torch.equal(*values)
    assert gradients_are_finite(values[0], far)
    assert gradients_are_finite(csdiv.log_overlap(far, backend=backend), far)


@on_every_backend
@on_every_dtype
def test_duplicated_components_are_one_with_the_merged_weight(dtype: torch.dtype, backend: str) -> None:
    p, q = mixture(dtype=dtype), mixture(6, dtype=dtype)
    double = testing.mixture_of(*(t.repeat(2, 1) for t in tensors(p)[:2]), p.log_weights.repeat(2) - math.log(2.0))
    band = testing.band("cs_divergence", double.to(torch.float64), q.to(torch.float64), dtype=dtype, scaled=False)
    difference = csdiv.cs_divergence(double, q, backend=backend) - csdiv.cs_divergence(p, q, backend=backend)
    assert difference.abs() <= 2.0 * band
