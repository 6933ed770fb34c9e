"""Memory that is kept between calls, and what is written once: few rows against many components."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from torch import Tensor

import csdiv
from csdiv import transforms
from csdiv.testing import mixture_of

pytestmark = pytest.mark.skipif("cpu" not in csdiv.available_backends(), reason="the CPU kernels are not built")

N, M, DIM = 3, 150_000, 16
"""Gradients to q are of 9.6 MB, which the system would provide anew for each call."""


def make(n: int, m: int, dim: int, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = ()) -> list[Tensor]:
    """Means and variances of p; means, variances and log weights of q, a tenth of them of weight zero."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    log_weights = normal(m).log_softmax(-1)
    log_weights[..., ::10] = -torch.inf
    found = [normal(n, dim), normal(n, dim).exp(), normal(m, dim), normal(m, dim).exp(), log_weights]
    return [t.to(dtype) for t in found]


def rows_and_gradients(tensors: list[Tensor], backend: str, upstream: float = 1.0) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    rows = csdiv.component_log_overlap(mixture_of(*leaves[:2]), mixture_of(*leaves[2:]), backend=backend)
    return [rows.detach(), *torch.autograd.grad(upstream * rows.sum(), leaves)]


def check(tensors: list[Tensor], upstream: float = 1.0) -> None:
    found = rows_and_gradients(tensors, "cpu", upstream)
    expected = rows_and_gradients([t.double() for t in tensors], "reference", upstream)
    for ours, right in zip(found, expected, strict=True):
        right = right.to(ours.dtype)
        scale = float(right.nan_to_num(0.0).abs().max())
        torch.testing.assert_close(ours, right, rtol=2e-5, atol=2e-5 * scale, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 17_001, 8), (5, 19_000, 7), (16, 8_001, 16), (17, 8_000, 16), (40, 6_700, 20)])
def test_few_rows(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(make(*size, dtype))


def test_few_rows_of_each_problem_of_a_batch() -> None:
    check(make(3, 9_000, 16, batch=(2,)))
    check([t[0] if k < 2 else t for k, t in enumerate(make(3, 9_000, 16, batch=(2,)))])


def test_gradients_that_no_cache_holds() -> None:
    tensors = make(1, 2**19 + 3, 16)
    _, _, _, *found = rows_and_gradients(tensors, "cpu")
    leaves = [t.requires_grad_() for t in tensors[2:]]
    p = csdiv.GaussianMixture(*tensors[:2], log_weights=torch.zeros(1))
    value = csdiv.log_overlap(p, mixture_of(*leaves), backend="cpu")  # the only row's: written by other code
    for ours, right in zip(found, torch.autograd.grad(value, leaves), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6 * float(right.abs().max()))


def test_few_rows_one_of_which_is_nan() -> None:
    tensors = make(N, 9_000, DIM)
    tensors[0][1, 2] = torch.nan
    tensors[4][::10] = -12.0  # a weight of zero times NaN is not agreed on
    check(tensors)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4)])
def test_few_rows_some_gradients(wanted: tuple[int, ...]) -> None:
    tensors = make(N, 20_000, DIM)
    everything = rows_and_gradients(tensors, "cpu")[1:]
    leaves = [t.clone().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    rows = csdiv.component_log_overlap(mixture_of(*leaves[:2]), mixture_of(*leaves[2:]), backend="cpu")
    for k, found in zip(wanted, torch.autograd.grad(rows.sum(), [leaves[k] for k in wanted]), strict=True):
        torch.testing.assert_close(found, everything[k])


def test_few_rows_have_the_same_bits_on_any_number_of_threads() -> None:
    tensors, before = make(20, 20_000, DIM), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(rows_and_gradients(tensors, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_empty_cache_gives_memory_back() -> None:
    gradients = rows_and_gradients(make(N, M, DIM), "cpu")
    held = [g.clone() for g in gradients]
    del gradients
    before = resident_mib()
    csdiv.empty_cache()
    assert resident_mib() < before - 15  # two gradients of 9.2 MiB each, and the logits
    csdiv.empty_cache()
    again = rows_and_gradients(make(N, M, DIM), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(held, again, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted there")
def test_calls_use_memory_again() -> None:
    import resource

    tensors = make(N, M, DIM)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        rows_and_gradients(tensors, "cpu")
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(4)) < 500  # small pages of the gradients alone are 4,700


def test_a_gradient_that_is_held_stays() -> None:
    first = rows_and_gradients(make(N, M, DIM), "cpu")
    copies = [t.clone() for t in first]
    other = rows_and_gradients(make(N + 1, M, DIM), "cpu")
    assert not torch.equal(first[3], other[3])
    csdiv.empty_cache()
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_empty_cache_while_another_thread_computes() -> None:
    tensors = make(N, 40_000, DIM)
    right = rows_and_gradients(tensors, "cpu")
    found: list[list[Tensor]] = []
    thread = threading.Thread(target=lambda: found.extend(rows_and_gradients(tensors, "cpu") for _ in range(5)))
    thread.start()
    while thread.is_alive():
        csdiv.empty_cache()
    thread.join()
    assert len(found) == 5
    assert all(torch.equal(a, b) for results in found for a, b in zip(results, right, strict=True))


@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.25])
@pytest.mark.parametrize("entry", [csdiv.component_log_overlap, csdiv.log_overlap])
def test_gradients_of_a_graph_that_is_kept_stay(entry: object, upstream: float) -> None:
    leaves = [t.requires_grad_() for t in make(3, 5, 2)]
    rows = entry(mixture_of(*leaves[:2]), mixture_of(*leaves[2:]), backend="cpu")  # type: ignore[operator]
    value = upstream * rows.sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    copies = [g.clone() for g in first]
    for g in first:
        g.mul_(2.0)
    second = torch.autograd.grad(value, leaves)
    assert all(torch.equal(a, b) for a, b in zip(copies, second, strict=True))
    assert all(torch.equal(a, 2 * b) for a, b in zip(first, second, strict=True))


def test_gradients_are_the_same_where_torch_does_not_tell_whether_a_graph_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = make(3, 5, 2)
    right = rows_and_gradients(tensors, "cpu", 3.0)
    monkeypatch.setattr(transforms, "graph_is_kept", lambda: True)
    assert all(torch.equal(a, b) for a, b in zip(rows_and_gradients(tensors, "cpu", 3.0), right, strict=True))
