"""Native kernels where their code takes another way: blocks, cuts of the work, and the limits of the fast form.

Values and gradients of every entry are held to the error budget of :mod:`csdiv.testing`, as in test_contract.py.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from contract import INPUTS, NATIVE, SCALARS, P, Q, call, eager_call, gradients_later
from torch import Tensor

import csdiv
from csdiv import _C, GaussianMixture, testing

PAIRS = ("cs_divergence", "log_overlap", "component_log_overlap", "pairwise_log_overlap")
on_every_backend = pytest.mark.parametrize("backend", NATIVE)
on_cpu = pytest.mark.parametrize("backend", ["cpu"])  # whose cut it is


@contextlib.contextmanager
def passes() -> Iterator[list[bool]]:
    """What the forward kernels return: whether the gradients came with the values, in one pass."""
    returned = list[bool]()

    def recorded(kernel: Any) -> Any:
        return lambda *arguments: returned.append(kernel(*arguments)) or returned[-1]

    with contextlib.ExitStack() as stack:
        for name in (f"cpu_{entry}_forward" for entry in (*SCALARS, "overlap_lse")):
            stack.enter_context(mock.patch.object(_C, name, recorded(getattr(_C, name))))
        yield returned


def check(
    entry: str,
    backend: str,
    p: GaussianMixture,
    q: GaussianMixture,
    wanted: tuple[str, ...] = P + Q,
    one_pass: bool = True,
    common_grad: float | None = None,
) -> None:
    """``entry`` of the float32 mixtures and its gradients against float64, within the derived budget."""
    given = dict(zip(P + Q, (p.means, p.variances, p.log_weights, q.means, q.variances, q.log_weights), strict=True))
    wanted = tuple(name for name in wanted if name in INPUTS[entry])

    def evaluate(dtype: torch.dtype, function: object) -> tuple[list[GaussianMixture], list[Tensor], Tensor]:
        leaves = {name: t.to(dtype, copy=True).requires_grad_(name in wanted) for name, t in given.items()}
        sides = [testing.mixture_of(*(leaves[name] for name in names)) for names in (P, Q)]
        return sides, [leaves[name] for name in wanted], function(*sides)

    sides, leaves, exact = evaluate(torch.float64, call(entry, "reference"))
    _, eager_leaves, eager = evaluate(torch.float32, eager_call(entry))
    band = testing.band(entry, *sides, scaled=True)
    if wanted:
        grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
        if common_grad is not None:
            grad = torch.full_like(grad, common_grad)
        bands = testing.gradient_bands(entry, *sides, grad, leaves)
        true, plain = (
            torch.autograd.grad(value, tensors, grad.to(value.dtype))
            for value, tensors in ((exact, leaves), (eager, eager_leaves))
        )
    for later in [False, True] if entry in SCALARS and wanted else [False]:
        with gradients_later() if later else contextlib.nullcontext(), passes() as returned:
            _, actual_leaves, actual = evaluate(torch.float32, call(entry, backend))
        given_at_once = entry in (*SCALARS, "component_log_overlap") and backend == "cpu"
        assert returned == [one_pass or later or not wanted] * given_at_once
        testing.assert_within_budget(actual, eager, exact, band)
        if not wanted:
            return
        found = torch.autograd.grad(actual, actual_leaves, grad)
        for name, *values in zip(wanted, found, plain, true, bands, strict=True):
            try:
                testing.assert_within_budget(*values)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}, later {later}: {error}") from None


def pair(n: int, m: int, dim: int, **options: object) -> tuple[GaussianMixture, GaussianMixture]:
    g = torch.Generator().manual_seed(n + m + dim)
    return tuple(testing.random_mixture(size, dim, generator=g, **options) for size in (n, m))


# Rows are cut in blocks, columns in groups, or both in phases; sums are merged after 1024 rows and 256 columns.
@on_every_backend
@pytest.mark.parametrize("wanted", [P + Q, P, Q], ids=["both", "rows", "columns"])
@pytest.mark.parametrize(("n", "m"), [(140, 150), (300, 1030), (1030, 300), (1100, 40), (40, 1100), (17, 1500)])
@pytest.mark.parametrize("entry", ["component_log_overlap", "log_overlap", "pairwise_log_overlap"])
def test_every_cut_of_the_work_gives_the_gradients(
    entry: str, n: int, m: int, wanted: tuple[str, ...], backend: str
) -> None:
    check(entry, backend, *pair(n, m, 2), wanted)
    if entry == "component_log_overlap":
        check(entry, backend, *pair(n, m, 2), wanted, common_grad=0.3)


# Slabs of rows, as gradient_sweep.h cuts them: 5 by rows, 2 by columns, 3 of a tile each.
@on_cpu
@pytest.mark.parametrize("wanted", [P + Q, P, Q], ids=["both", "rows", "columns"])
@pytest.mark.parametrize(("n", "m", "dim"), [(1100, 1100, 2), (150, 10000, 3), (40, 66000, 1)])
@pytest.mark.parametrize("entry", ["component_log_overlap", "log_overlap"])
def test_every_slab_gives_the_gradients(
    entry: str, n: int, m: int, dim: int, wanted: tuple[str, ...], backend: str
) -> None:
    check(entry, backend, *pair(n, m, dim), wanted, common_grad=0.3)


# Weights of whole vectors of columns are zero for all rows of a register tile: runs of columns are left out, first,
# last, between others, and all of them but for single rows.
@on_cpu
@pytest.mark.parametrize("wanted", [P + Q, P, Q], ids=["both", "rows", "columns"])
@pytest.mark.parametrize("entry", ["component_log_overlap", "log_overlap"])
def test_columns_without_weights_are_left_out(entry: str, wanted: tuple[str, ...], backend: str) -> None:
    generator = torch.Generator().manual_seed(7)

    def clusters(size: int, each: int) -> GaussianMixture:
        made = testing.random_mixture(size, 5, generator=generator)
        cluster = torch.arange(size) // each % 4
        return testing.mixture_of(made.means + 50.0 * cluster.unsqueeze(-1), made.variances, made.log_weights)

    p, q = clusters(39, 8), clusters(170, 37)
    logits = csdiv.pairwise_log_overlap(p, q, backend="cpu")
    assert (logits - logits.amax(-1, keepdim=True) < -100).float().mean() > 0.7
    check(entry, backend, p, q, wanted)


def test_slabs_in_the_square_cut() -> None:
    """So large that float64 would take long: one pass against two, which other tests hold to float64."""
    p, q = pair(1500, 1100, 260)
    for entry in ("component_log_overlap", "log_overlap"):
        found = []
        for last in (1.0, 1.0 + torch.finfo().eps):
            with gradients_later() if found else contextlib.nullcontext():
                leaves = [t.clone().requires_grad_() for side in (p, q) for t in (side.means, side.variances)]
                rows = call(entry, "cpu")(testing.mixture_of(*leaves[:2]), testing.mixture_of(*leaves[2:]))
                grad = torch.ones_like(rows)
                grad.view(-1)[-1] = last
                found.append(torch.autograd.grad(rows, leaves, grad))
        for once, twice in zip(*found, strict=True):
            assert (once - twice).norm() <= 1e-5 * twice.norm()


@on_cpu
def test_column_groups_share_no_sums_of_rows(backend: str) -> None:
    """Two threads that added to the same sums would lose a share of one of them now and then."""
    p, q = pair(16, 512, 64)
    found = []
    for threads in (1, *(2,) * 50):
        torch.set_num_threads(threads)
        means = p.means.clone().requires_grad_()
        value = call("log_overlap", backend)(GaussianMixture(means, p.variances, log_weights=p.log_weights), q)
        found.append(torch.autograd.grad(value, means)[0])
    assert all(torch.equal(found[0], grad) for grad in found)


@on_every_backend
@pytest.mark.parametrize("size", [255, 256, 257, 272, 1030])
def test_self_overlap_crosses_stripes_and_blocks(size: int, backend: str) -> None:
    check("self_overlap", backend, *pair(size, 1, 2), P)


# The square cut, for which the sums of columns have to be large: 2 and 3 phases.
@on_cpu
@pytest.mark.parametrize("wanted", [P + Q, P, Q], ids=["both", "rows", "columns"])
@pytest.mark.parametrize(("n", "m", "dim"), [(20, 100, 1700), (33, 200, 900)])
def test_every_phase_of_the_square_cut_gives_the_gradients(
    n: int, m: int, dim: int, wanted: tuple[str, ...], backend: str
) -> None:
    check("log_overlap", backend, *pair(n, m, dim), wanted)


@on_cpu
def test_self_overlap_in_the_square_cut(backend: str) -> None:
    check("self_overlap", backend, *pair(70, 1, 1700), P)


# Sums so large that blocks are launched in phases: 4, 2 and 3 with the two multiprocessors of the emulation.
@pytest.mark.parametrize(
    ("entry", "n", "m", "dim"),
    [("log_overlap", 200, 250, 130), ("log_overlap", 260, 200, 150), ("cs_divergence", 300, 70, 60)],
)
def test_every_phase_of_a_launch_gives_the_gradients(entry: str, n: int, m: int, dim: int) -> None:
    check(entry, "emulation", *pair(n, m, dim))


# Dimensions come in groups of four and, from 128 on, in several accumulators.
@on_every_backend
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 127, 128, 129, 130, 131, 258])
@pytest.mark.parametrize("entry", PAIRS)
def test_every_number_of_dimensions(entry: str, dim: int, backend: str) -> None:
    check(entry, backend, *pair(6, 19, dim))


# Powers of two around the limits from which the fast form may not be taken: 2^±20 for the sum of two variances and
# 2^30 for the difference of two means; two sizes within a group of dimensions, so that products take every order.
@on_every_backend
@pytest.mark.parametrize("exponents", [(-22, -22), (-21, 19), (19, 19), (20, -20), (18, -21), (21, 20), (0, 24)])
@pytest.mark.parametrize("entry", PAIRS)
def test_variances_around_the_limits_of_the_fast_form(entry: str, exponents: tuple[int, int], backend: str) -> None:
    p, q = pair(18, 21, 7)
    scale = 2.0 ** torch.tensor([exponents[d % 2] for d in range(7)])
    check(
        entry,
        backend,
        *(GaussianMixture(s.means * scale.sqrt(), s.variances * scale, log_weights=s.log_weights) for s in (p, q)),
    )


@on_every_backend
@pytest.mark.parametrize("exponent", [-600, -480, 600])
def test_float64_far_from_one(exponent: int, backend: str) -> None:
    """Variances of 2^±600: products of four of them are no number."""
    p, q = (
        GaussianMixture(
            s.means.double() * 2.0 ** (exponent // 2), s.variances.double() * 2.0**exponent, log_weights=s.log_weights
        )
        for s in pair(18, 21, 7)
    )
    for entry in PAIRS:
        value, exact = (call(entry, name)(p, q) for name in (backend, "reference"))
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)


@on_every_backend
@pytest.mark.parametrize("distance", [2.0**28, 2.0**30, 2.0**31, 2.0**40, -(2.0**31), -(2.0**40)])
@pytest.mark.parametrize("variance", [2.0**-19, 1.0, 2.0**19])
def test_means_around_the_limits_of_the_fast_form(variance: float, distance: float, backend: str) -> None:
    """δ²c³ is largest where the difference is in one dimension of a group and the variances in the others."""
    p, q = pair(18, 21, 4)
    far = torch.tensor([1.0, 0.0, 0.0, 0.0]) * distance
    q = GaussianMixture(q.means + far, q.variances * variance, log_weights=q.log_weights)
    p = GaussianMixture(p.means, p.variances * variance, log_weights=p.log_weights)
    half = tuple(GaussianMixture(side.means - far / 2, side.variances, log_weights=side.log_weights) for side in (p, q))
    for entry in ("component_log_overlap", "pairwise_log_overlap"):
        for sides in ((p, q), (q, p), half, half[::-1]):
            check(entry, backend, *sides, ())


@on_every_backend
@pytest.mark.parametrize("gap", [80.0, 87.0, 88.0, 95.0, 104.0, 120.0])
@pytest.mark.parametrize("entry", ["component_log_overlap", "log_overlap"])
def test_shares_down_to_the_smallest_numbers(entry: str, gap: float, backend: str) -> None:
    """Column j has the share e^−(gap + j/4): a share below the normal numbers may be zero, nothing else."""
    p, q = pair(3, 40, 3, structure="tied spherical")
    log_weights = torch.cat([torch.zeros(1), -gap - 0.25 * torch.arange(39)])
    check(entry, backend, p, GaussianMixture(q.means * 0.1, q.variances, log_weights=log_weights))


@on_every_backend
@pytest.mark.parametrize("step", [-30.0, -3.0, 3.0, 30.0])
@pytest.mark.parametrize("entry", SCALARS)
def test_weights_that_rise_or_fall_from_tile_to_tile(entry: str, step: float, backend: str) -> None:
    """Sums of the weights of the first tiles are scaled when those of later ones exceed them."""
    p, q = pair(150, 140, 2)
    p, q = (
        GaussianMixture(s.means, s.variances, log_weights=s.log_weights + step / 16 * torch.arange(len(s.means)))
        for s in (p, q)
    )
    check(entry, backend, p, q)


@on_every_backend
@pytest.mark.parametrize("step", [-30.0, 30.0])
def test_weights_that_rise_or_fall_over_merged_sums(step: float, backend: str) -> None:
    """So many rows that the sums of two stripes of columns are merged on the way, and the other way round."""
    p, q = pair(10000, 70, 2)
    p = GaussianMixture(p.means, p.variances, log_weights=p.log_weights + step / 1000 * torch.arange(10000))
    check("log_overlap", backend, p, q)
    check("log_overlap", backend, q, p)


MORE_THAN_A_SLAB = (1 << 20) // {"avx512": 16, "avx2": 8}.get(_C.cpu_isa(), 4) + 4000
"""Rows against one column, which fills a vector."""


@pytest.mark.parametrize(
    ("backend", "n", "one_pass"), [*((name, 140, True) for name in NATIVE), ("cpu", MORE_THAN_A_SLAB, False)]
)
def test_gradients_that_overflow_before_the_largest_weight_is_met(backend: str, n: int, one_pass: bool) -> None:
    """δ²/c² of all rows but the last is beyond float32, and so are their sums where they are all there is of a slab."""
    p, q = pair(140, 1, 3)
    variances = torch.tensor([1e-25, 1.0, 1e20])
    q = GaussianMixture(q.means, variances[None], log_weights=q.log_weights)
    means = torch.cat([p.means[torch.arange(n - 1) % 139], q.means])
    log_weights = p.log_weights[torch.arange(n) % 140]
    for k in (0, -5):
        p = GaussianMixture(means.roll(k, 0), variances.expand(n, 3), log_weights=log_weights)
        check("log_overlap", backend, p, q, one_pass=one_pass)
        check("log_overlap", backend, q, p)


@on_cpu
def test_rows_without_a_value_take_a_second_pass(backend: str) -> None:
    p, q = pair(40, 30, 3)
    log_weights = torch.cat([q.log_weights[:-1], torch.tensor([torch.inf])])
    leaves = [t.clone().requires_grad_() for t in (p.means, q.means)]
    with passes() as returned:
        rows = call("component_log_overlap", backend)(
            GaussianMixture(leaves[0], p.variances), GaussianMixture(leaves[1], q.variances, log_weights=log_weights)
        )
    assert returned == [False]
    assert rows.isnan().all()
    assert all(grad.isnan().all() for grad in torch.autograd.grad(rows.sum(), leaves))


@on_every_backend
@pytest.mark.parametrize("batches", [((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((1,), (2,))])
def test_batches_of_several_tiles_and_stripes(batches: tuple[tuple[int, ...], tuple[int, ...]], backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (testing.random_mixture(k, 2, batch_shape=b, generator=g) for k, b in zip((37, 290), batches, strict=True))
    for entry in PAIRS:
        check(entry, backend, p, q)


@on_cpu
@pytest.mark.parametrize("entry", ["log_overlap", "self_overlap", "cs_divergence"])
@pytest.mark.parametrize("odd", ["means", "variances", "log_weights"])
def test_values_beside_one_that_is_not_finite_do_not_depend_on_gradients(entry: str, odd: str, backend: str) -> None:
    """The fused pass gives up at once; what other problems have must not come from there."""
    g = torch.Generator().manual_seed(0)
    p, q = (testing.random_mixture(4, 9, batch_shape=(6,), generator=g) for _ in range(2))
    tensors = {"means": p.means, "variances": p.variances, "log_weights": p.log_weights}
    tensors[odd] = tensors[odd].clone()
    tensors[odd][3, 2] = {"means": torch.nan, "variances": -1.0, "log_weights": torch.inf}[odd]
    plain = call(entry, backend)(GaussianMixture(**tensors), q)
    call(entry, backend)(q, p)  # leaves other numbers in memory that is used again
    with_gradients = call(entry, backend)(GaussianMixture(**{k: t.requires_grad_() for k, t in tensors.items()}), q)
    assert plain.isfinite().tolist() == [True, True, True, False, True, True]
    torch.testing.assert_close(with_gradients.detach(), plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("position", [(0, 0), (4, 7)])
@pytest.mark.parametrize("of_p", [True, False])
def test_one_number_out_of_range_takes_the_exact_form(position: tuple[int, int], of_p: bool) -> None:
    """Its square, times the variances of three other dimensions, is beyond float32."""
    g = torch.Generator().manual_seed(0)
    means, others = (torch.randn(n, 8, generator=g) for n in (5, 37))
    means[position] = 1e18
    sides = [GaussianMixture(m, torch.full_like(m, 7.0)) for m in (means, others)]
    p, q = sides if of_p else sides[::-1]
    exact = csdiv.pairwise_log_overlap(p.to(torch.float64), q.to(torch.float64), backend="reference")
    torch.testing.assert_close(csdiv.pairwise_log_overlap(p, q, backend="cpu").double(), exact, rtol=1e-5, atol=1e-4)
