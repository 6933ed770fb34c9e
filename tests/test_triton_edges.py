"""The Triton kernels at the edges: parts, limits of the fast form, memory beyond outputs, bad inputs, near zero."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import interpreter
import pytest
import test_bad_inputs
import test_bad_inputs_values
import test_kernels_edges
import torch
from contract import (
    DTYPES,
    P,
    Q,
    call,
)
from test_near_zero import near_copies
from torch import Tensor
from triton_marks import NAME, interpreted

import csdiv
from bench import tune
from csdiv import GaussianMixture, backends, testing
from csdiv.kernels import configurations

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


@interpreted
@pytest.mark.parametrize(("entry", "wanted"), [("cs_divergence", ()), ("log_overlap", P + Q)])
def test_columns_in_parts(entry: str, wanted: tuple[str, ...]) -> None:
    """Two parts or more of the rows' sums, and of the sweeps; the same bits with gradients and without."""
    p, q = (testing.random_mixture(k, 1, generator=torch.Generator().manual_seed(k)) for k in (3, 390))
    assert configurations.cut(interpreter.PROCESSORS * 16, 1, 390 // 128 + 1) == 2
    test_kernels_edges.check(entry, NAME, p, q, wanted)
    if wanted:
        with_gradients = [side.map(lambda t: t.clone().requires_grad_()) for side in (p, q)]
        assert torch.equal(call(entry, NAME)(p, q), call(entry, NAME)(*with_gradients))
        assert torch.equal(q.assign(p, backend=NAME), q.assign(p, backend="reference"))


@interpreted
def test_parts_do_not_change_the_assignment_of_equal_ones() -> None:
    q = GaussianMixture(torch.ones(520, 1), torch.ones(1, 1))
    assert q.assign(torch.zeros(2, 1), backend=NAME).tolist() == [0, 0]
    heavier = torch.zeros(520)
    heavier[[200, 400]] = 1.0
    q = GaussianMixture(torch.ones(520, 1), torch.ones(1, 1), log_weights=heavier)
    assert q.assign(torch.zeros(2, 1), backend=NAME).tolist() == [200, 200]


@interpreted
@pytest.mark.parametrize("exponents", [(-22, -22), (-21, 19), (19, 19), (20, -20), (21, 20)])
def test_variances_around_the_limits_of_the_fast_form(exponents: tuple[int, int]) -> None:
    test_kernels_edges.test_variances_around_the_limits_of_the_fast_form("component_log_overlap", exponents, NAME)


@interpreted
@pytest.mark.parametrize("distance", [2.0**28, 2.0**31, -(2.0**40)])
def test_means_around_the_limits_of_the_fast_form(distance: float) -> None:
    test_kernels_edges.test_means_around_the_limits_of_the_fast_form(1.0, distance, NAME)


@interpreted
@pytest.mark.parametrize("exponent", [-600, 600])
def test_float64_far_from_one(exponent: int) -> None:
    test_kernels_edges.test_float64_far_from_one(exponent, NAME)


@interpreted
def test_some_dimensions_fast_and_others_exact() -> None:
    """A tile has flags for 32 dimensions each: these of one variance, those of variances a factor of 1e30 apart."""
    p, q = test_kernels_edges.pair(5, 6, 40)
    wild = torch.ones(40)
    wild[35] = 1e15
    q = GaussianMixture(q.means, torch.cat([q.variances[:3] * wild, q.variances[3:] / wild]), log_weights=q.log_weights)
    test_kernels_edges.check("log_overlap", NAME, p, q)


@interpreted
def test_shares_down_to_the_smallest_numbers() -> None:
    test_kernels_edges.test_shares_down_to_the_smallest_numbers("component_log_overlap", 95.0, NAME)


@pytest.fixture
def canaries() -> Iterator[list[Tensor]]:
    """Puts memory that nobody may write before and behind whatever is allocated for kernels; all of it so far."""
    guards = list[Tensor]()

    def padded(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(t: Tensor, *shape: Any, **options: Any) -> Tensor:
            size = torch.Size(*shape) if isinstance(shape[0], Sequence) else torch.Size(shape)
            whole = plain(t, (size.numel() + 128,), **options)
            guards.extend(guard.fill_(77) for guard in (whole[:64], whole[-64:]))
            return whole[64:-64].view(size)

        return allocate

    with contextlib.ExitStack() as patches:
        for name in ("new_empty", "new_zeros"):
            patches.enter_context(mock.patch.object(Tensor, name, padded(getattr(Tensor, name))))
        yield guards


@interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (5, 129, 2)])
def test_nothing_is_written_beyond_the_outputs(
    n: int, m: int, dim: int, dtype: torch.dtype, canaries: list[Tensor]
) -> None:
    p, q = (testing.random_mixture(k, dim, dtype=dtype).map(lambda t: t.clone().requires_grad_()) for k in (n, m))
    leaves = [t for side in (p, q) for t in (side.means, side.variances, side.log_weights)]
    for entry in ("cs_divergence", "component_log_overlap", "pairwise_log_overlap"):
        value = call(entry, NAME)(p, q)
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    q.assign(p, backend=NAME)
    assert len(canaries) > 50
    assert all(bool((guard == 77).all()) for guard in canaries)


@interpreted
@pytest.mark.parametrize(("item", "n", "tile", "dim"), [(0, 5, 0, 3), (3, 2**20, 8191, 1025), (2**20, 300, 2, 40)])
def test_offsets_beyond_32_bits(item: int, n: int, tile: int, dim: int) -> None:
    probe = importlib.import_module("triton_probes").tile_offsets
    kernel = importlib.import_module("triton.runtime.interpreter").InterpretedFunction(probe)
    values, flags = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    value_offsets, flag_offset = torch.zeros(128, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](values, flags, value_offsets, flag_offset, item, n, tile, dim)
    tiles = item * -(-n // 128) + tile
    first = 4 * tiles * 256 * (-(-dim // 4) * 4)
    assert value_offsets.tolist() == [first + 4 * k for k in range(128)]
    assert flag_offset.item() == 4 * tiles * -(-dim // 32)


BAD_INPUTS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_bad_inputs.test_no_points, {}),
    (test_bad_inputs.test_half_precision_is_computed_in_float32, {"dtype": torch.bfloat16}),
    (test_bad_inputs_values.test_infinite_or_undefined_weight, {"value": float("inf")}),
    *(
        (test, {"dtype": torch.float32})
        for test in (
            test_bad_inputs_values.test_a_side_without_any_weight,
            test_bad_inputs_values.test_negative_variance_gives_nan,
            test_bad_inputs_values.test_zero_variance_is_a_point,
            test_bad_inputs_values.test_infinite_variance_overlaps_with_nothing,
            test_bad_inputs_values.test_means_far_apart,
            test_bad_inputs_values.test_duplicated_components_are_one_with_the_merged_weight,
        )
    ),
]


@interpreted
@pytest.mark.parametrize(("test", "arguments"), BAD_INPUTS, ids=lambda a: getattr(a, "__name__", ""))
def test_bad_inputs(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    test(backend=NAME, **arguments)


@interpreted
@pytest.mark.parametrize("distance", [0.0, 1e-3])
def test_cs_divergence_near_zero(distance: float) -> None:
    p, q = near_copies(64, 20, distance)
    exact = csdiv.cs_divergence(p.to(torch.float64), q.to(torch.float64), backend="reference")
    assert (csdiv.cs_divergence(p, q, backend=NAME).double() - exact).abs() <= 6e-6


@interpreted
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize(("dim", "size"), [(8, 20), (64, 12)])
def test_cs_divergence_of_tied_variances_near_zero(dim: int, size: int, distance: float) -> None:
    """Both sides tied, and one of them: the three terms in up to three forms."""
    p, q = near_copies(dim, size, distance, "tied diagonal")
    untied = GaussianMixture(q.means, q.variances * (1 + distance * torch.randn(size, dim)), log_weights=q.log_weights)
    for other in (q, untied):
        exact = csdiv.cs_divergence(p.to(torch.float64), other.to(torch.float64), backend="reference")
        assert (csdiv.cs_divergence(p, other, backend=NAME).double() - exact).abs() <= 6e-6


@interpreted
def test_a_cold_capture_is_refused_until_warmup() -> None:
    backend, p = backends.resolve(NAME, torch.device("cpu")), testing.random_mixture(3, 2)
    with mock.patch.object(backend, "capturing", return_value=True), mock.patch.object(backend, "loaded", set()):
        with pytest.raises(RuntimeError, match=r"CUDA graph capture on cpu: call csdiv.warmup\('cpu'\) before it"):
            csdiv.log_overlap(p, backend=NAME)
        backend.loaded.add(torch.device("cpu"))
        csdiv.log_overlap(p, backend=NAME)


@interpreted
@pytest.mark.parametrize("key", tune.LAUNCHES, ids=str)
def test_every_tile_that_is_timed_gives_the_same(key: tuple[str, str, torch.dtype], capsys) -> None:
    """bench tune, with the interpreter in place of the GPU: warps and stages are nothing to it."""
    tiles = list({tile.block_n: tile for tile in tune.candidates(*key[1:])}.values())
    dim, options = 16 if configurations.takes_products(key[1]) else 3, {"size": 3, "rounds": 1, "device": "cpu"}
    module, backend = importlib.import_module("csdiv.backends.triton"), backends.resolve(NAME, torch.device("cpu"))
    with mock.patch.object(module, "backend", backend):
        assert list(tune.measure(*key, dim, tiles, **options)) == tiles
    assert capsys.readouterr().out == ""
