"""The CUDA backend's host side, where there is no GPU: what loads kernels, which device is asked and set."""

import contextlib
import importlib.util
import shutil
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

import csdiv
from csdiv import backends, testing


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
