"""Batches of tiny problems on the CPU: several at once, one in each lane, and what sends them another way."""

import pytest
import torch
from test_kernels_edges import check, passes
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

SIZES = [(64, 16, 16, 1), (37, 5, 7, 3), (16, 32, 2, 8), (17, 1, 1, 2)]
"""B, N, M, D; vectors have 4, 8 or 16 lanes of float32."""


def batch(size: tuple[int, int, int, int], seed: int = 0) -> tuple[GaussianMixture, GaussianMixture]:
    b, n, m, d = size
    g = torch.Generator().manual_seed(seed)
    p, q = (testing.random_mixture(k, d, batch_shape=(b,), generator=g) for k in (n, m))
    return p, q


def gradients(p: GaussianMixture, q: GaussianMixture) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in (p.means, p.variances, p.log_weights, q.means, q.variances)]
    value = csdiv.cs_divergence(
        testing.mixture_of(*leaves[:3]), testing.mixture_of(*leaves[3:], q.log_weights), backend="cpu"
    )
    return value.detach(), list(torch.autograd.grad(value.sum(), leaves))


@pytest.mark.parametrize("size", SIZES)
def test_tiny_batches_stay_within_the_budget(size: tuple[int, int, int, int]) -> None:
    check("cs_divergence", "cpu", *batch(size))


@pytest.mark.parametrize("size", SIZES)
def test_tiny_batches_near_zero_stay_within_the_stated_bound(size: tuple[int, int, int, int]) -> None:
    p, _ = batch(size)
    q = GaussianMixture(p.means + 1e-4, p.variances, log_weights=p.log_weights)
    exact = csdiv.cs_divergence(p.to(torch.float64), q.to(torch.float64), backend="reference")
    assert ((csdiv.cs_divergence(p, q, backend="cpu") - exact).abs() <= 2e-6).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_of_float64_equals_its_problems(size: tuple[int, int, int, int]) -> None:
    """A single problem takes the other way: term by term."""
    p, q = (side.to(torch.float64) for side in batch(size))
    values, grads = gradients(p, q)
    for b in range(size[0]):
        value, own = gradients(p.map(lambda t, b=b: t[b]), q.map(lambda t, b=b: t[b]))
        torch.testing.assert_close(values[b], value, rtol=1e-12, atol=1e-12)
        for all_of_them, grad in zip(grads, own, strict=True):
            torch.testing.assert_close(all_of_them[b], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "what", ["far apart", "tiny variance", "no weight", "NaN", "negative variance", "infinite weight"]
)
def test_one_odd_problem_goes_another_way_and_spoils_no_other(what: str) -> None:
    p, q = batch((40, 4, 4, 2))
    means, variances, log_weights = p.means.clone(), p.variances.clone(), p.log_weights.clone()
    if what == "far apart":
        means[20] += 1e20
    elif what == "tiny variance":
        variances[20] = 1e-30
    elif what == "no weight":
        log_weights[20] = -torch.inf
    elif what == "NaN":
        means[20, 1, 1] = torch.nan
    elif what == "negative variance":
        variances[20, 1, 1] = -0.1
    else:
        log_weights[20, 2] = torch.inf
    odd = GaussianMixture(means, variances, log_weights=log_weights)
    values, grads = gradients(odd, q)
    expected, expected_grads = gradients(p, q)
    others = torch.arange(40) != 20
    torch.testing.assert_close(values[others], expected[others], rtol=1e-5, atol=2e-6)
    for grad, plain in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad[others], plain[others], rtol=1e-4, atol=1e-6)
    alone, alone_grads = gradients(odd.map(lambda t: t[20]), q.map(lambda t: t[20]))
    assert torch.equal(values[20].isnan(), alone.isnan())
    torch.testing.assert_close(values[20], alone, rtol=0, atol=0, equal_nan=True)
    for grad, own in zip(grads, alone_grads, strict=True):
        torch.testing.assert_close(grad[20], own, rtol=0, atol=0, equal_nan=True)


def test_components_without_weight_are_absent_from_tiny_batches() -> None:
    p, q = batch((24, 6, 5, 2))
    padded = p.log_weights.clone()
    padded[:, 4:] = -torch.inf
    values, grads = gradients(GaussianMixture(p.means, p.variances, log_weights=padded), q)
    expected, _ = gradients(GaussianMixture(p.means[:, :4], p.variances[:, :4], log_weights=p.log_weights[:, :4]), q)
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-6)
    assert all((grad[:, 4:] == 0).all() for grad in grads[:3])


def test_tiny_batches_give_the_same_bits_for_any_number_of_threads() -> None:
    p, q = batch((203, 16, 16, 1))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            values, grads = gradients(p, q)
            found.append([values, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_tiny_batches_take_one_pass_and_odd_ones_two() -> None:
    p, q = batch((40, 4, 4, 2))
    far = p.means.clone()
    far[20] += 1e20
    with passes() as taken:
        gradients(p, q)
        gradients(GaussianMixture(far, p.variances, log_weights=p.log_weights), q)
    assert taken == [True, False]


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("side", ["p", "q"])
def test_a_weight_that_is_not_a_number_shows_in_its_problem_alone(side: str, k: int) -> None:
    p, q = batch((40, 3, 3, 1))
    log_weights = p.log_weights.clone()
    log_weights[11, k] = torch.nan
    odd = GaussianMixture(p.means, p.variances, log_weights=log_weights)
    values = csdiv.cs_divergence(*((odd, q) if side == "p" else (q, odd)), backend="cpu")
    assert values.isnan().nonzero().tolist() == [[11]]
