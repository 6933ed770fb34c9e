"""The CUDA kernels on the host: nothing depends on the order of threads.

The contract itself holds "emulation" like every other backend, see test_contract.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import emulation
import pytest
import torch

import csdiv
from csdiv import testing


@pytest.fixture
def native() -> Iterator[Any]:
    module = sys.modules[f"csdiv.backends.{emulation.NAME}"].native
    yield module
    module.set_order(module.Order.FORWARD)


def results(n: int, m: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and gradients of every kernel."""
    g = torch.Generator().manual_seed(n + m)
    p, q = (testing.random_mixture(size, dim, dtype=dtype, generator=g).map(torch.clone) for size in (n, m))
    leaves = [t.requires_grad_() for side in (p, q) for t in (side.means, side.variances, side.log_weights)]
    found = [q.assign(p, backend=emulation.NAME)]
    for value in (
        csdiv.cs_divergence(p, q, backend=emulation.NAME),
        csdiv.component_log_overlap(p, q, backend=emulation.NAME),
        csdiv.pairwise_log_overlap(p, q, backend=emulation.NAME),
    ):
        grads = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)
        found += [value, *(grad for grad in grads if grad is not None)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (65, 63, 5), (70, 300, 9), (3, 5, 37)])
def test_threads_in_any_order_give_the_same_bits(n: int, m: int, dim: int, dtype: torch.dtype, native: Any) -> None:
    runs = []
    for order in (native.Order.FORWARD, native.Order.REVERSE, native.Order.RANDOM):
        native.set_order(order)
        blocks = native.blocks_run()
        runs.append(results(n, m, dim, dtype))
        assert native.blocks_run() > blocks
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
