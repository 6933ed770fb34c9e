"""The Triton backend: what it says where it cannot run, and what auto takes."""

from __future__ import annotations

import re
import subprocess
import sys
from unittest import mock

import pytest
import torch

from csdiv import backends

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy's, of infinities and NaN


# What the backend says where it cannot run


def test_a_status_says_what_is_missing() -> None:
    status = backends._triton_status.__wrapped__
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert status() == (False, "the package triton is not installed: pip install triton")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert not status().available
    with (
        mock.patch("importlib.util.find_spec"),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.version, "hip", "6.0"),
    ):
        assert "NVIDIA" in status().reason
    capability = {"get_device_capability": lambda device: (7, 5 + device.index), "get_device_name": lambda device: "T4"}
    with mock.patch.multiple(torch.cuda, **capability):
        assert "8.0 or later is needed, T4 has 7.6" in backends._too_old(torch.device("cuda:1"))


def available(backend: str, yes: bool = True) -> None:
    """Registers a stand-in for a backend of GPUs that says so."""
    stand_in = backends.resolve("reference", torch.device("cpu"))
    status = backends.BackendStatus(yes, "" if yes else "not here")
    backends.register(
        backend,
        lambda: mock.Mock(wraps=stand_in, spec=stand_in, lacks=frozenset(), composed=frozenset()),
        device="cuda",
        status=lambda: status,
    )


def test_cpu_tensors_are_refused() -> None:
    with backends.registrations_restored():
        available("triton")
        with pytest.raises(RuntimeError, match='backend "triton" computes on CUDA tensors, got cpu'):
            backends.resolve("triton", torch.device("cpu"))


@pytest.mark.parametrize(("present", "chosen"), [(("cuda", "triton"), "cuda"), (("triton",), "triton")])
def test_auto_on_a_gpu_takes_the_best_one(present: tuple[str, ...], chosen: str) -> None:
    gpu = torch.device("cuda")
    with backends.registrations_restored():
        for name in ("cuda", "triton"):
            available(name, name in present)
        assert backends.resolve("auto", gpu) is backends.resolve(chosen, gpu)
        assert backends.resolve("auto", gpu, operator="full_overlap_lse") is backends.resolve("reference", gpu)


def test_auto_elsewhere_is_the_reference() -> None:
    assert backends.resolve("auto", torch.device("mps")) is backends.resolve("reference", torch.device("mps"))


@pytest.mark.parametrize(
    ("structure", "dim", "form"),
    [
        ("tied", 64, "tied matrix in float32: matrix products, .*; tied in float64: the sum of sq.*"),
        ("spherical", 64, "spherical matrix in float32: matrix products, .*"),
        ("tied", 15, "tied in float32: the sum of squares, as D < 16; .*"),
        ("diagonal", 64, "diagonal, .*"),
    ],
)
def test_the_explanation_names_the_form(structure: str, dim: int, form: str) -> None:
    assert re.fullmatch(form, backends._form("triton", structure, dim))
    assert backends._form("cuda", structure, dim).startswith("diagonal, ")


def test_nothing_of_triton_is_imported_without_need() -> None:
    code = "import csdiv, csdiv.kernels, sys; csdiv.backend_status(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
