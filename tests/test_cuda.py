"""The CUDA backend where it belongs, on CUDA tensors: streams, graphs, devices, memory.

Values and gradients are held to the contract like those of every backend, see gpu.py.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, testing

needs_gpu = pytest.mark.skipif("cuda" not in csdiv.available_backends(), reason="no GPU that csdiv was built for")


def pair(
    n: int, m: int, dim: int, device: str = "cuda", dtype: torch.dtype = torch.float32
) -> tuple[GaussianMixture, GaussianMixture]:
    g = torch.Generator().manual_seed(n)
    made = (testing.random_mixture(k, dim, dtype=dtype, generator=g) for k in (n, m))
    return tuple(side.to(device).map(lambda t: t.detach().requires_grad_()) for side in made)


def leaves(*sides: GaussianMixture) -> list[Tensor]:
    return [t for side in sides for t in (side.means, side.variances, side.log_weights)]


def value_and_gradients(p: GaussianMixture, q: GaussianMixture) -> list[Tensor]:
    found = []
    for value in (csdiv.cs_divergence(p, q), csdiv.cs_regularizer(p.means, p.variances, q).cos()):
        grads = torch.autograd.grad(value, leaves(p, q), torch.ones_like(value), allow_unused=True)
        found += [value.detach(), *(g for g in grads if g is not None)]
    return found


@needs_gpu
def test_auto_takes_the_kernels() -> None:
    p, q = pair(70, 65, 5)
    assert all(
        torch.equal(a, b)
        for a, b in zip([csdiv.cs_divergence(p, q)], [csdiv.cs_divergence(p, q, backend="cuda")], strict=True)
    )
    with pytest.raises(RuntimeError, match="computes on CUDA tensors"):
        csdiv.cs_divergence(p.to("cpu"), q.to("cpu"), backend="cuda")


@needs_gpu
@pytest.mark.parametrize("size", [(16, 16, 2), (128, 500, 40), (1000, 3000, 17)])
def test_the_same_bits_every_time_and_on_every_stream(size: tuple[int, int, int]) -> None:
    p, q = pair(*size)
    first = value_and_gradients(p, q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = [value_and_gradients(p, q) for _ in range(20)]
    torch.cuda.synchronize()
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, run, strict=True))


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    p, q = pair(300, 200, 9)
    csdiv.warmup()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(p, q)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("size", [(16, 16, 2), (128, 500, 40), (700, 900, 33)])
def test_graph_replays_give_the_same_bits(size: tuple[int, int, int]) -> None:
    csdiv.warmup()
    p, q = pair(*size)
    expected = value_and_gradients(p, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(p, q)
    for _ in range(3):
        for t in captured:
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


GRAPHED = """
import sys, torch, csdiv
from csdiv import GaussianMixture
x = [(torch.rand(70, 5, device="cuda") + 0.5).requires_grad_() for _ in range(4)]
def value(*x):
    return csdiv.cs_divergence(GaussianMixture(*x[:2]), GaussianMixture(*x[2:]))
if sys.argv[1] == "graphed":
    call = torch.cuda.make_graphed_callables(value, tuple(x))
else:
    call = torch.compile(value, mode="reduce-overhead", fullgraph=True)
for _ in range(4):
    torch.compiler.cudagraph_mark_step_begin()
    grads = [g.clone() for g in torch.autograd.grad(call(*x), x)]
assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(value(*x), x)))
"""


@needs_gpu
@pytest.mark.parametrize("way", ["graphed", "compiled"])
def test_graphs_that_torch_captures_need_no_warmup(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", GRAPHED, way], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_other_devices_get_no_context() -> None:
    code = """
import torch, csdiv
p = csdiv.GaussianMixture(torch.rand(9, 3, device="cuda:1"), torch.rand(9, 3, device="cuda:1"))
assert csdiv.log_overlap(p, backend="cuda").isfinite()
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_gpu
def test_memory_is_linear_in_the_components() -> None:
    p, q = pair(20_000, 20_000, 16)
    value_and_gradients(p, q)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    value_and_gradients(p, q)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 400 * 2**20, f"{extra / 2**20:.0f} MiB"  # the pairs alone would be 1.5 GiB


@needs_gpu
@pytest.mark.parametrize("size", [(5000, 5000, 32), (100, 100_000, 16), (50_000, 70, 8)])
def test_large_problems_against_float64(size: tuple[int, int, int]) -> None:
    p, q = pair(*size)
    exact = value_and_gradients(*(side.map(lambda t: t.detach().double().requires_grad_()) for side in (p, q)))
    for value, truth in zip(value_and_gradients(p, q), exact, strict=True):
        assert (value.double() - truth).norm() <= 3e-5 * truth.norm()


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_device_is_used() -> None:
    p, q = pair(70, 65, 5, "cuda:1")
    with torch.cuda.device(0):
        run = value_and_gradients(p, q)
    assert all(t.device == torch.device("cuda:1") for t in run)
    expected = value_and_gradients(*pair(70, 65, 5, "cuda:0"))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(run, expected, strict=True))
