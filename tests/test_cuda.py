"""The CUDA backend where it belongs, on CUDA tensors: streams, graphs, devices, memory; and what needs no GPU of that.

Values and gradients are held to the contract like those of every backend, see gpu.py.
"""

import warnings
from collections.abc import Iterator
from unittest import mock

import emulation
import gpu
import pytest
import torch
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, testing

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


@pytest.fixture
def forgotten() -> Iterator[None]:
    backend = emulation.backend()
    loaded, backend.loaded = backend.loaded, set()
    yield
    backend.loaded = loaded


def test_a_cold_capture_is_refused_until_warmup(forgotten: None) -> None:
    p = testing.random_mixture(3, 2)
    with mock.patch.object(emulation.backend(), "capturing", return_value=True):
        with pytest.raises(RuntimeError, match=r"CUDA graph capture on cpu: call csdiv.warmup\('cpu'\) before it"):
            csdiv.log_overlap(p, backend=emulation.NAME)
        with pytest.raises(RuntimeError, match="warmup"):
            csdiv.warmup("cpu", backend=emulation.NAME)  # too late
    csdiv.warmup("cpu", backend=emulation.NAME)
    with mock.patch.object(emulation.backend(), "capturing", return_value=True):
        csdiv.log_overlap(p, backend=emulation.NAME)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_warmup_leaves_no_trace(backend: str) -> None:
    state = torch.get_rng_state()
    assert csdiv.warmup("cpu", backend=backend) is None
    assert torch.equal(state, torch.get_rng_state())


def test_warmup_of_what_is_not_there_says_so() -> None:
    if "cuda" not in csdiv.available_backends():
        with pytest.raises(RuntimeError, match='backend "cuda" is not available'):
            csdiv.warmup("cpu", backend="cuda")


def test_a_gpu_that_has_no_kernels_is_refused_with_the_reason() -> None:
    """Beside one that has them, which "cuda" is available for."""
    device, reason = torch.device("cuda:1"), "built for 90a-real, but not for this one"
    with backends.registrations_restored(), mock.patch.object(backends, "_missing_kernels", return_value=reason):
        backends.register("cuda", emulation.backend, device="cuda")
        backends.register("triton", emulation.backend, status=lambda: backends.BackendStatus(False, ""))
        with pytest.raises(RuntimeError, match=f"not available: {reason}"):
            backends.resolve("cuda", device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert backends.resolve("auto", device) is backends.resolve("reference", device)


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


def test_the_backend_of_tests_on_a_gpu_is_one_of_its_own() -> None:
    """gpu.install() runs on machines with a GPU alone; what is registered for a test is gone after it."""
    before = csdiv.backend_status()
    with backends.registrations_restored():
        gpu.register(emulation.NAME, gpu.NAME)
        assert gpu.NAME in csdiv.backend_status()
        assert backends.has_full(gpu.NAME)
        with mock.patch.object(gpu, "_copied", side_effect=lambda value, device: value) as copied:
            p, q = (testing.random_mixture(k, 2) for k in (3, 4))
            value = csdiv.cs_divergence(p, q, backend=gpu.NAME)
        assert [call.args[1] for call in copied.call_args_list] == ["cuda", "cpu"]
        assert torch.equal(value, csdiv.cs_divergence(p, q, backend=emulation.NAME))
    assert csdiv.backend_status() == before
    with pytest.raises(ValueError, match="backend: one of"):
        csdiv.cs_divergence(p, q, backend=gpu.NAME)
