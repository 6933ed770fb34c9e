"""The CUDA backend where it belongs, on CUDA tensors: streams, graphs, devices, memory; and what needs no GPU of that.

Values and gradients are held to the contract like those of every backend, see gpu.py.
"""

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import emulation
import gpu
import pytest
import torch
from entries import function, tensors
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
def cold(tmp_path: Path) -> Iterator[ModuleType]:
    """Another copy of the emulation, which has launched nothing yet, in its place."""
    backend = emulation.backend()
    native = emulation.load(Path(shutil.copy(str(backend.native.__file__), tmp_path)), f"{tmp_path.name}.")
    with mock.patch.object(backend, "native", native):
        yield native


@contextlib.contextmanager
def captured(native: ModuleType) -> Iterator[None]:
    """As if the stream were captured into a CUDA graph."""
    native.set_capturing(True)
    yield
    native.set_capturing(False)


REFUSAL = r'CUDA graph capture on cuda:0: call csdiv.warmup\("cuda:0"\), or the same function, before it'


def test_a_cold_capture_is_refused_until_warmup(cold: ModuleType) -> None:
    p = testing.random_mixture(3, 2)
    with captured(cold):
        with pytest.raises(RuntimeError, match=REFUSAL):
            csdiv.log_overlap(p, backend=emulation.NAME)
        with pytest.raises(RuntimeError, match=REFUSAL):
            csdiv.warmup("cpu", backend=emulation.NAME)  # too late
    csdiv.warmup("cpu", backend=emulation.NAME)
    with captured(cold):
        for entry in ("cs_divergence", "component_log_overlap", "cs_regularizer"):
            x = tensors(entry, torch.float32)
            function(entry, emulation.NAME)(*x).sum().backward()


@pytest.mark.parametrize("entry", ["cs_divergence", "component_log_overlap", "pairwise_log_overlap", "cs_regularizer"])
def test_what_was_called_before_can_be_captured(cold: ModuleType, entry: str) -> None:
    """As torch.cuda.make_graphed_callables and torch.compile(mode="reduce-overhead") do it."""
    x, call = tensors(entry, torch.float32), function(entry, emulation.NAME)
    with torch.no_grad():
        call(*x)
        with captured(cold):
            call(*x)
            with pytest.raises(RuntimeError, match=REFUSAL):  # other kernels
                call(*(t.double() for t in x))
    with captured(cold), pytest.raises(RuntimeError, match=REFUSAL):
        call(*x).sum().backward()
    torch.autograd.grad(call(*x).sum(), x)
    with captured(cold):
        torch.autograd.grad(call(*x).sum(), x)


def test_what_launches_nothing_loads_nothing(cold: ModuleType) -> None:
    p, q = testing.random_mixture(3, 2, batch_shape=(0,)), testing.random_mixture(3, 2)
    csdiv.cs_divergence(p, p, backend=emulation.NAME)
    with captured(cold), pytest.raises(RuntimeError, match=REFUSAL):
        csdiv.cs_divergence(q, q, backend=emulation.NAME)


def test_only_the_device_of_a_call_is_set(cold: ModuleType) -> None:
    """To set one creates a context there."""
    p = testing.random_mixture(3, 2)
    csdiv.log_overlap(p, backend=emulation.NAME)
    assert cold.cuda_kernels_status(0) == ""
    assert cold.devices_set() == []
    assert cold.cuda_kernels_status(1) == ""
    assert cold.devices_set() == [1, 0]


def test_only_the_device_of_the_tensors_is_asked() -> None:
    asked: list[torch.device] = []
    with backends.registrations_restored(), mock.patch.object(torch.cuda, "current_device", return_value=0):
        backends.register("cuda", emulation.backend, device="cuda", missing=lambda d: asked.append(d) or "")
        for name in ("auto", "cuda"):
            assert backends.resolve(name, torch.device("cuda:1")) is emulation.backend()
        assert set(asked) == {torch.device("cuda:1")}
        assert csdiv.backend_status()["cuda"].available
        assert asked[-1] == torch.device("cuda:0")


def test_the_status_of_the_machine_asks_no_device() -> None:
    built = mock.Mock(has_cuda=True, cuda_versions=lambda: (13000, 13000))
    cuda = {"is_available": lambda: True, "current_device": mock.Mock(side_effect=AssertionError)}
    with mock.patch.object(csdiv, "_C", built, create=True), mock.patch.multiple(torch.cuda, **cuda):
        assert backends._cuda_status.__wrapped__().available
        if torch.version.hip is None and importlib.util.find_spec("triton"):
            assert backends._triton_status.__wrapped__().available


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
    with backends.registrations_restored():
        backends.register("cuda", emulation.backend, device="cuda", missing=lambda device: reason)
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
