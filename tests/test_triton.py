"""The Triton backend: what it says where it cannot run, and what auto takes."""

from __future__ import annotations

import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from contract import (
    call,
    gradients_later,
)

from csdiv import backends, testing

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


# What the backend says where it cannot run


def test_a_status_says_what_is_missing() -> None:
    status = backends._triton_status.__wrapped__
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert status() == (False, "the package triton is not installed: pip install triton")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert not status().available
    with mock.patch("importlib.util.find_spec"), mock.patch.object(torch.cuda, "is_available", return_value=True):
        with mock.patch.object(torch.version, "hip", "6.0"):
            assert "NVIDIA" in status().reason
        capability = {"get_device_capability": lambda: (7, 5), "get_device_name": lambda: "T4"}
        with mock.patch.multiple(torch.cuda, **capability), mock.patch.object(torch.version, "hip", None):
            assert "8.0 or later is needed, T4 has 7.5" in status().reason


def test_cpu_tensors_are_refused() -> None:
    with (
        mock.patch.dict(backends._STATUS, triton=lambda: backends.BackendStatus(True, "")),
        pytest.raises(RuntimeError, match='backend "triton" computes on CUDA tensors, got cpu'),
    ):
        backends._resolve.__wrapped__("triton", torch.device("cpu"), ())


@pytest.mark.parametrize(("available", "chosen"), [(("cuda", "triton"), "cuda"), (("triton",), "triton")])
def test_auto_on_a_gpu_takes_the_best_one(available: tuple[str, ...], chosen: str) -> None:
    statuses = {name: (lambda name=name: backends.BackendStatus(name in available, "")) for name in ("cuda", "triton")}
    with (
        mock.patch.dict(backends._STATUS, statuses),
        mock.patch.object(backends, "_missing_kernels", return_value=""),
        mock.patch("importlib.import_module") as load,
    ):
        backends._resolve.__wrapped__("auto", torch.device("cuda"), ("cuda", "triton"))
    load.assert_called_once_with(f"csdiv.backends.{chosen}")


@pytest.mark.parametrize(
    ("shape", "device", "order"),
    [
        (backends.Shape(2048, 512, 16, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "tied"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "tied rows"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 15, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 511, 16, "spherical"), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16), "cuda", ("cuda", "triton")),
        (backends.Shape(), "cuda", ("cuda", "triton")),
        (backends.Shape(2048, 512, 16, "spherical"), "cpu", ("cpu",)),
        (backends.Shape(2048, 512, 16, "spherical"), "mps", ()),
    ],
)
def test_auto_takes_the_first_line_of_the_table_that_applies(
    shape: backends.Shape, device: str, order: tuple[str, ...]
) -> None:
    assert backends.order_of(device, shape) == order
    with mock.patch.object(backends, "_resolve") as taken:
        backends.resolve("auto", torch.device(device), shape)
    taken.assert_called_once_with("auto", torch.device(device), order)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (
            backends.Shape(9, 9, 64, "tied"),
            "tied matrix in float32: matrix products, .*; tied in float64: the sum of sq.*",
        ),
        (backends.Shape(9, 9, 64, "spherical"), "spherical matrix in float32: matrix products, .*"),
        (backends.Shape(9, 9, 15, "tied"), "tied in float32: the sum of squares, as D < 16; .*"),
        (backends.Shape(9, 9, 64), "diagonal, .*"),
    ],
)
def test_the_explanation_names_the_form(shape: backends.Shape, form: str) -> None:
    assert re.fullmatch(form, backends._form("triton", shape))
    assert backends._form("cuda", shape).startswith("diagonal, ")


@pytest.mark.parametrize(("structure", "name"), [("spherical", "spherical"), ("tied diagonal", "tied")])
@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "self_overlap", "component_log_overlap"])
def test_both_directions_ask_for_the_same_shape(entry: str, structure: str, name: str) -> None:
    """What the forward pass saves is read by the same backend."""
    p, q = (testing.random_mixture(k, 3, structure=structure).map(lambda t: t.requires_grad_()) for k in (4, 5))
    with mock.patch.object(backends, "resolve", wraps=backends.resolve) as asked, gradients_later():
        value = call(entry, "auto")(p, q)
        value.backward(torch.arange(float(value.numel())).view(value.shape))
    shapes = {arguments.args[2] for arguments in asked.call_args_list}
    assert len(asked.call_args_list) > 1
    assert shapes == {backends.Shape(4, 4 if entry == "self_overlap" else 5, 3, name)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch may import triton for a GPU")
def test_nothing_of_triton_is_imported_without_need() -> None:
    code = "import csdiv, csdiv.kernels, sys; csdiv.backend_status(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
