"""Bad and unusual shapes, dtypes and devices. Messages name the argument, what was expected and what came."""

import math
from collections.abc import Callable

import pytest
import torch
from bad_inputs import (
    gradients_are_finite,
    mixture,
    on_every_backend,
    on_every_function,
    ones,
    tensors,
    with_gradients,
)
from torch import Tensor

import csdiv
from csdiv import GaussianMixture

# 1–5: shapes


@on_every_function
@on_every_backend
def test_dimensions_that_differ(function: Callable[..., Tensor], backend: str) -> None:
    with pytest.raises(ValueError, match=r"D = 3 in \w+ and D = 4 in \w+"):
        function(mixture(d=3), mixture(d=4), backend=backend)


def test_dimensions_that_differ_in_the_regularizer() -> None:
    with pytest.raises(ValueError, match="D = 3 in means and D = 4 in prior"):
        csdiv.cs_regularizer(ones(2, 3), ones(2, 3), mixture(d=4))
    for means, log_variances in ((ones(2, 3), ones(2, 1)), (ones(3), ones(3))):
        with pytest.raises(
            ValueError, match=r"means and log_variances of one shape \(\*batch, B, D\) expected, got \("
        ):
            csdiv.cs_regularizer(means, log_variances, mixture())


@pytest.mark.parametrize(
    "arguments",
    [
        {"variances": ones(5, 3)},
        {"variances": ones(4, 2)},
        {"variances": ones(4, 1), "log_weights": ones(5)},
        {"variances": ones(4, 1), "logits": ones(1)},
        {"scale_tril": torch.eye(3).expand(5, 3, 3)},
        {"scale_tril": torch.eye(2).expand(4, 2, 2)},
        {"covariance_matrix": torch.eye(3).expand(2, 3, 3)},
    ],
    ids=lambda a: "-".join(f"{k}{tuple(v.shape)}" for k, v in a.items()).replace(" ", ""),
)
def test_component_counts_that_differ(arguments: dict[str, Tensor]) -> None:
    name, wrong = list(arguments.items())[-1]
    with pytest.raises(
        ValueError, match=rf"{name}: .* K = 4.* got \({', '.join(map(str, wrong.shape))},?\) for means \(4, 3\)"
    ):
        GaussianMixture(ones(4, 3), **arguments)


@on_every_function
@on_every_backend
def test_batch_shapes_that_do_not_broadcast(function: Callable[..., Tensor], backend: str) -> None:
    with pytest.raises(ValueError, match=r"batch shapes that broadcast expected, got \(\d,\) in \w+ and \(\d,\)"):
        function(mixture(batch_shape=(2,)), mixture(batch_shape=(3,)), backend=backend)


def test_batch_shapes_that_do_not_broadcast_within_a_mixture() -> None:
    with pytest.raises(ValueError, match=r"batch shapes do not broadcast: means \(2, 4, 3\).*variances \(3, 4, 3\)"):
        GaussianMixture(ones(2, 4, 3), ones(3, 4, 3))


def test_channels_that_do_not_fit() -> None:
    p, q = mixture(), mixture(5)
    for shape in ((4,), (2, 5), (2, 1)):
        with pytest.raises(ValueError, match=r"p_log_weights: \(\*batch, C, K\) with K = 4 expected, got \("):
            csdiv.channel_log_overlap(p, q, ones(*shape), ones(2, 5))
    with pytest.raises(ValueError, match=r"q_log_weights: \(\*batch, C, K\) with K = 5 expected, got \(2, 4\)"):
        csdiv.channel_log_overlap(p, q, ones(2, 4), ones(2, 4))
    with pytest.raises(ValueError, match=r"got \(2,\) in p and \(3,\) in p_log_weights"):
        csdiv.channel_log_overlap(mixture(batch_shape=(2,)), q, ones(3, 2, 4), ones(2, 5))
    with pytest.raises(ValueError, match=r"got \(2,\) in p and \(3,\) in q"):
        csdiv.channel_log_overlap(p, q, ones(2, 1, 4), ones(3, 1, 5))


@pytest.mark.parametrize("bandwidth", [0.0, -1, -0.5, math.nan])
def test_bandwidth_that_is_no_length(bandwidth: float) -> None:
    with pytest.raises(ValueError, match=f"bandwidth: a number > 0 expected, got {bandwidth}"):
        csdiv.mmd2(mixture(), mixture(), bandwidth)
    assert csdiv.mmd2(mixture(), mixture(), torch.tensor([bandwidth, 1.0])).isnan().tolist() == [True, False]


def test_bandwidth_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"got \(2,\) in q and \(3,\) in bandwidth"):
        csdiv.mmd2(mixture(), mixture(batch_shape=(2,)), ones(3))
    with pytest.raises(TypeError, match=r"bandwidth: floating point expected, got torch.int64"):
        csdiv.mmd2(mixture(), mixture(), torch.tensor(1))
    with pytest.raises(ValueError, match="one device expected, got p on cpu and bandwidth on meta"):
        csdiv.mmd2(mixture(), mixture(), ones(device="meta"))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_too_few_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"means: \(\*batch, K, D\) expected, got \("):
        GaussianMixture(ones(*shape), ones(1, 1))
    with pytest.raises(ValueError, match=r"variances: \(\*batch, K or 1, D or 1\)"):
        GaussianMixture(ones(3, 3), ones(*shape))
    with pytest.raises(ValueError, match=r"x: \(\*batch, n, D\) expected, got \("):
        mixture().log_prob(ones(*shape))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)])
def test_no_components_or_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one component and one dimension expected"):
        GaussianMixture(ones(*shape), ones(1, 1))


@on_every_backend
def test_no_points(backend: str) -> None:
    """Points and codes are data, and may be none."""
    x, p = torch.empty(0, 3, requires_grad=True), with_gradients(mixture())
    for name, shape in (("log_prob", (0,)), ("responsibilities", (0, 4)), ("assign", (0,))):
        assert getattr(p, name)(x, backend=backend).shape == shape
    for value in (p.log_prob(x, backend=backend), csdiv.cs_regularizer(x, x, p, backend=backend)):
        assert value.shape == (0,)
        assert gradients_are_finite(value, p)


# 6–13: batches, dtypes, devices, views, gradients on request: test_contract.py has values; here the rest


@on_every_function
@on_every_backend
def test_empty_batch(function: Callable[..., Tensor], backend: str) -> None:
    p, q = with_gradients(mixture(batch_shape=(0,))), with_gradients(mixture(5))
    value = function(p, q, backend=backend)
    assert value.shape[0] == 0
    if value.is_floating_point():
        value.sum().backward()
        assert all(t.grad is None or not t.grad.any() for side in (p, q) for t in tensors(side))


@on_every_backend
def test_float32_with_float64_is_promoted(backend: str) -> None:
    p, q = with_gradients(mixture()), with_gradients(mixture(dtype=torch.float64))
    value = csdiv.cs_divergence(p, q, backend=backend)
    assert value.dtype == torch.float64
    assert torch.equal(value, csdiv.cs_divergence(p.to(torch.float64), q, backend=backend))
    value.backward()
    assert (p.means.grad.dtype, q.means.grad.dtype) == (torch.float32, torch.float64)
    mixed = GaussianMixture(p.means, p.variances.double(), log_weights=p.log_weights)
    assert mixed.dtype == csdiv.log_overlap(mixed, backend=backend).dtype == torch.float64


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, backend: str) -> None:
    p, q = (with_gradients(mixture(dtype=dtype)) for _ in range(2))
    value = csdiv.cs_divergence(p, q, backend=backend)
    assert torch.equal(value, csdiv.cs_divergence(p.to(torch.float32), q.to(torch.float32), backend=backend))
    value.backward()
    assert all(t.grad.dtype == dtype for side in (p, q) for t in tensors(side))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating_point(dtype: torch.dtype) -> None:
    wrong = ones(3, 3).to(dtype)
    for call in (
        lambda: GaussianMixture(wrong, ones(1, 1)),
        lambda: GaussianMixture(ones(3, 3), wrong),
        lambda: GaussianMixture(ones(3, 3), ones(1, 1), log_weights=wrong[0]),
        lambda: GaussianMixture(ones(3, 3), ones(1, 1), logits=wrong[0]),
        lambda: mixture().log_prob(wrong),
        lambda: csdiv.cs_regularizer(wrong, wrong, mixture()),
    ):
        with pytest.raises(TypeError, match=f"floating point expected, got {dtype}"):
            call()
    with pytest.raises(TypeError, match="means: a tensor expected, got list"):
        GaussianMixture([[1.0]], ones(1, 1))


def test_tensors_on_different_devices() -> None:
    meta = ones(4, 3, device="meta")
    with pytest.raises(ValueError, match="parameters on one device expected, got meta and cpu"):
        GaussianMixture(meta, ones(1, 1))
    with pytest.raises(ValueError, match="one device expected, got p on cpu and q on meta"):
        csdiv.cs_divergence(mixture(), GaussianMixture(meta, meta))
    with pytest.raises(ValueError, match="one device expected, got q on cpu and weights on meta"):
        csdiv.channel_log_overlap(mixture(), mixture(), ones(1, 4), meta.mT)
    with pytest.raises(ValueError, match="one device expected, got means on cpu and log_variances on meta"):
        csdiv.cs_regularizer(ones(4, 3), meta, mixture())


@on_every_backend
def test_things_that_are_no_mixture(backend: str) -> None:
    with pytest.raises(TypeError, match=r"q: a csdiv.GaussianMixture, .* expected, got torch\.Tensor"):
        csdiv.cs_divergence(mixture(), ones(4, 3), backend=backend)
