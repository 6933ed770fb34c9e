"""The CPU kernels where variances are shared over dimensions or components, and so pairs take other forms.

Held to the error budget, as in test_contract.py, which has every combination of structures at one size.
"""

import itertools
import math
import time
from collections.abc import Callable

import pytest
import torch
from contract import Case, P, Q, call
from contract import check as check_case
from test_kernels_edges import check

from csdiv import _C, GaussianMixture, log_overlap, testing

SHARED = (
    ("spherical", "spherical"),
    ("tied spherical", "spherical"),
    ("tied diagonal", "diagonal"),
    ("diagonal", "tied diagonal"),
    ("spherical", "tied spherical"),
)
"""Every form: one variance for all dimensions, for all components of p, and for all of q."""
DISTANCES = tuple(f"spread {k}" for k in (1, 3, 10, 30, 100)) + tuple(f"shifted {k}" for k in (0, 3, 30, 300))
on_shared = pytest.mark.parametrize("structures", SHARED, ids="+".join)


def pair(
    n: int, m: int, dim: int, structures: tuple[str, str], batches: tuple[tuple[int, ...], ...] = ((), ())
) -> list[GaussianMixture]:
    g = torch.Generator().manual_seed(n + m + dim)
    return [
        testing.random_mixture(size, dim, structure=structure, batch_shape=batch, generator=g)
        for size, structure, batch in zip((n, m), structures, batches, strict=True)
    ]


@pytest.mark.parametrize("scale", DISTANCES)
@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap", "pairwise_log_overlap"])
@on_shared
def test_means_far_apart_or_far_from_the_origin(entry: str, structures: tuple[str, str], scale: str) -> None:
    check_case(Case(entry, n=17, m=40, dim=33, structures=structures, scale=scale), "cpu")


@pytest.mark.parametrize("scale", DISTANCES)
def test_points_far_apart_or_far_from_the_origin(scale: str) -> None:
    check_case(Case("log_prob", n=17, m=40, dim=33, scale=scale), "cpu")


@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap"])
def test_near_pairs_far_from_their_center(entry: str, spread: float) -> None:
    """Products of centered means would cancel, so that these pairs take the sums of squares."""
    g = torch.Generator().manual_seed(int(spread))
    q = testing.random_mixture(40, 32, structure="spherical", spread=spread, generator=g)
    check(entry, "cpu", GaussianMixture(q.means[:20] + 0.1, q.variances[:20], log_weights=q.log_weights[:20]), q)


def test_tiny_weights_take_no_longer() -> None:
    """Of points most pairs weigh less than the smallest normal number; on Intel's CPUs that cost 20 times as much."""

    def seconds(p: GaussianMixture, q: GaussianMixture) -> float:
        leaves = [t.clone().requires_grad_() for side in (p, q) for t in (side.means, side.variances, side.log_weights)]
        times = []
        for _ in range(3):
            start = time.thread_time()
            value = log_overlap(testing.mixture_of(*leaves[:3]), testing.mixture_of(*leaves[3:]), backend="cpu")
            torch.autograd.grad(value, leaves)
            times.append(time.thread_time() - start)
        return min(times)

    torch.set_num_threads(1)
    p, q = pair(512, 512, 128, ("spherical", "spherical"))
    points = GaussianMixture(p.means, torch.zeros(1, 1), log_weights=p.log_weights)
    assert seconds(points, q) < 5 * seconds(p, GaussianMixture(q.means, q.variances * 100, log_weights=q.log_weights))


# Register tiles, their remainders, tiles, stripes; dimensions from 128 on in several accumulators.
@pytest.mark.parametrize(
    ("n", "m", "dim"), [(1, 1, 2), (3, 9, 3), (19, 25, 4), (18, 300, 5), (300, 65, 2), (5, 20, 257)]
)
@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap", "pairwise_log_overlap"])
@on_shared
def test_every_size(entry: str, n: int, m: int, dim: int, structures: tuple[str, str]) -> None:
    check(entry, "cpu", *pair(n, m, dim, structures))


@pytest.mark.parametrize("wanted", [*((name,) for name in P + Q), P, Q, ()], ids="+".join)
@on_shared
def test_every_gradient_alone(wanted: tuple[str, ...], structures: tuple[str, str]) -> None:
    check("log_overlap", "cpu", *pair(21, 40, 12, structures), wanted)


@pytest.mark.parametrize("exponent", [-30, -21, -20, 19, 20, 30])
@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap", "pairwise_log_overlap"])
@on_shared
def test_variances_around_the_limits_of_the_fast_forms(entry: str, exponent: int, structures: tuple[str, str]) -> None:
    """Those of p's second half only, where a side has several, so that tiles of both kinds meet."""
    sides = []
    for side in pair(40, 300, 11, structures):
        variances = side.variances.clone()
        variances[len(variances) // 2 :] *= 2.0**exponent
        sides.append(GaussianMixture(side.means, variances, log_weights=side.log_weights))
    check(entry, "cpu", *sides)


@pytest.mark.parametrize("batches", [((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((3,), (3,))], ids=str)
@pytest.mark.parametrize("alone", [(), (0,), (1,), (0, 1)], ids=str)
@on_shared
def test_batches_with_variances_of_their_own_and_without(
    alone: tuple[int, ...], batches: tuple[tuple[int, ...], ...], structures: tuple[str, str]
) -> None:
    """``alone``: the sides whose variances have no batch dimensions."""
    sides = pair(18, 37, 10, structures, batches)
    for k in alone:
        p = sides[k]
        sides[k] = GaussianMixture(p.means, p.variances[(0,) * len(batches[k])], log_weights=p.log_weights)
    for entry in ("cs_divergence", "component_log_overlap", "pairwise_log_overlap"):
        check(entry, "cpu", *sides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@on_shared
def test_shared_variances_agree_with_full_arrays(dtype: torch.dtype, structures: tuple[str, str]) -> None:
    p, q = (side.to(dtype) for side in pair(33, 70, 24, structures))
    full = [
        GaussianMixture(s.means, s.variances.expand(s.means.shape).contiguous(), log_weights=s.log_weights)
        for s in (p, q)
    ]
    eps = torch.finfo(dtype).eps
    for entry in ("cs_divergence", "component_log_overlap", "pairwise_log_overlap"):
        torch.testing.assert_close(call(entry, "cpu")(p, q), call(entry, "cpu")(*full), rtol=64 * eps, atol=64 * eps)
    assert torch.equal(q.assign(p, backend="cpu"), full[1].assign(full[0], backend="cpu"))


@pytest.mark.parametrize("name", _C.cpu_isas())
@on_shared
def test_every_instruction_set(name: str, structures: tuple[str, str], isa: Callable[[str], None]) -> None:
    isa(name)
    check("cs_divergence", "cpu", *pair(35, 70, 13, structures))


@on_shared
def test_shared_variances_give_the_same_bits_for_any_number_of_threads(structures: tuple[str, str]) -> None:
    sides = pair(1200, 1100, 9, structures)
    tensors = [t.requires_grad_() for side in sides for t in (side.means, side.variances, side.log_weights)]
    runs = []
    for count in (1, 2, 1, 2):
        torch.set_num_threads(count)
        value = call("cs_divergence", "cpu")(*sides)
        runs.append([value, *torch.autograd.grad(value, tensors)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@on_shared
def test_weights_of_zero_and_negative_variances(structures: tuple[str, str]) -> None:
    """A component of weight zero counts nothing; a negative variance is NaN, also where the pair's sum is positive."""
    p, q = pair(20, 30, 10, structures)
    weights = q.log_weights.clone()
    weights[::2] = -math.inf
    check("cs_divergence", "cpu", p, GaussianMixture(q.means, q.variances, log_weights=weights))
    for k, j in itertools.product((0, 1), (0, -1)):
        sides = [p, q]
        variances = sides[k].variances.clone()
        variances.view(-1)[j] = -0.01
        sides[k] = GaussianMixture(sides[k].means, variances, log_weights=sides[k].log_weights)
        rows = call("pairwise_log_overlap", "cpu")(*sides)
        expected = call("pairwise_log_overlap", "reference")(*sides)
        assert torch.equal(rows.isnan(), expected.isnan())
        assert rows.isnan().any()
