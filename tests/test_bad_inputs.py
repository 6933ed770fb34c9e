"""Bad and unusual inputs: what each gets. Messages name the argument, what was expected and what came."""

import math
from collections.abc import Callable

import pytest
import torch
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "cs_divergence": csdiv.cs_divergence,
    "log_overlap": csdiv.log_overlap,
    "component_log_overlap": csdiv.component_log_overlap,
    "pairwise_log_overlap": csdiv.pairwise_log_overlap,
    "cosine_similarity": csdiv.cosine_similarity,
    "ise": csdiv.ise,
    "nise": csdiv.nise,
    "mmd2": lambda p, q, backend: csdiv.mmd2(p, q, 0.7, backend=backend),
    "channel_log_overlap": lambda p, q, backend: csdiv.channel_log_overlap(p, q, *channels(p, q), backend=backend),
    "responsibilities": lambda p, q, backend: q.responsibilities(p, backend=backend),
    "assign": lambda p, q, backend: q.assign(p, backend=backend),
}

REDUCTIONS = ("cosine_similarity", "ise", "nise", "mmd2", "channel_log_overlap")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_every_function = pytest.mark.parametrize("function", list(FUNCTIONS.values()), ids=list(FUNCTIONS))
on_every_reduction = pytest.mark.parametrize("function", [FUNCTIONS[name] for name in REDUCTIONS], ids=REDUCTIONS)
on_every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def ones(*shape: int, **options: object) -> Tensor:
    return torch.ones(shape, **options)


def mixture(k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, **options)


def tensors(p: GaussianMixture) -> list[Tensor]:
    return [t for t in (p.means, p.variances, p.log_weights) if t is not None]


def channels(p: GaussianMixture, q: GaussianMixture) -> tuple[Tensor, Tensor]:
    """One channel of each side, of its own weights."""
    return p.log_weights.unsqueeze(-2), q.log_weights.unsqueeze(-2)


def with_gradients(p: GaussianMixture) -> GaussianMixture:
    return p.map(lambda t: t.clone().requires_grad_())


def gradients_are_finite(value: Tensor, *sides: GaussianMixture) -> bool:
    """Whether no gradient of the sum of ``value`` is NaN or infinite."""
    inputs = [t for side in sides for t in tensors(side) if t.requires_grad]
    grads = torch.autograd.grad(value.sum(), inputs, materialize_grads=True, retain_graph=True)
    return all(bool(g.isfinite().all()) for g in grads)


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
    mixed = GaussianMixture(p.means, p.variances.double(), p.log_weights)
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
        lambda: GaussianMixture(ones(3, 3), ones(1, 1), wrong[0]),
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
    with pytest.raises(TypeError, match="q: a GaussianMixture or a torch distribution expected, got Tensor"):
        csdiv.cs_divergence(mixture(), ones(4, 3), backend=backend)


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


def with_absent_component(p: GaussianMixture, index: int, **values: float) -> GaussianMixture:
    """p with a component of weight zero inserted, whose means and variances are ``values``."""

    def insert(t: Tensor, value: float) -> Tensor:
        return torch.cat([t[:index], torch.full_like(t[:1], value), t[index:]])

    means, variances, log_weights = tensors(p)
    return GaussianMixture(
        insert(means, values["means"]), insert(variances, values["variances"]), insert(log_weights, -math.inf)
    )


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
    q = with_gradients(GaussianMixture(q.means, q.variances, torch.full_like(q.log_weights, -math.inf)))
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
        GaussianMixture(*tensors(q), validate=True)


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
        GaussianMixture(*tensors(q), validate=True)


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
        GaussianMixture(*tensors(p), validate=True)


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
    pairs = csdiv.pairwise_log_overlap(GaussianMixture(*leaves), q, backend=backend)
    for grad in torch.autograd.grad(pairs.sum(), leaves, retain_graph=True):
        assert grad.isnan().any(-1).tolist() == [i == 2 for i in range(5)]
    for grad in torch.autograd.grad(pairs[3:].sum(), leaves):
        assert not grad.isnan()[[0, 1, 3, 4]].any()


@on_every_reduction
@on_every_backend
def test_values_that_make_no_mixture_in_reductions(function: Callable[..., Tensor], backend: str) -> None:
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
def test_variance_zero_in_reductions(backend: str) -> None:
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
    q = with_gradients(GaussianMixture(q.means + distance, q.variances, q.log_weights))
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
    double = GaussianMixture(*(t.repeat(2, 1) for t in tensors(p)[:2]), p.log_weights.repeat(2) - math.log(2.0))
    band = testing.band("cs_divergence", double.to(torch.float64), q.to(torch.float64), dtype=dtype, scaled=False)
    difference = csdiv.cs_divergence(double, q, backend=backend) - csdiv.cs_divergence(p, q, backend=backend)
    assert difference.abs() <= 2.0 * band
