"""Which formula a pair takes, in which files a call goes, and backends that are registered."""

import re
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import csdiv
from csdiv import GaussianMixture, backends, pairs, testing

ROOT = Path(__file__).resolve().parents[1]


def mixture(structure: str, k: int = 3, dim: int = 2, batch: tuple[int, ...] = ()) -> GaussianMixture:
    return testing.random_mixture(k, dim, structure=structure, batch_shape=batch, dtype=torch.float64)


@pytest.mark.parametrize(
    ("p", "q", "formula"),
    [
        ("diagonal", "tied spherical", pairs.DIAGONAL),
        ("full", "diagonal", pairs.FULL),
        ("tied full", "full", pairs.FULL),
        ("tied full", "tied full", pairs.WHITENED),
        ("tied full", "tied diagonal", pairs.WHITENED),
        ("diagonal", "tied full", pairs.FULL),
    ],
)
def test_the_formula_follows_from_the_covariances(p: str, q: str, formula: str) -> None:
    sides = mixture(p), mixture(q, 4)
    for backend in ("auto", "cpu"):
        assert pairs.route(*sides, backend).formula == formula
        assert pairs.route(*sides[::-1], backend).formula == formula
    assert pairs.route(*sides, "reference").eager


def test_a_batch_of_covariances_that_shares_means_is_not_whitened() -> None:
    shared = mixture("tied full")
    batch = mixture("tied full", batch=(5,))
    covariances = batch.scale_tril
    assert covariances is not None
    assert pairs.route(batch, batch, "auto").formula == pairs.WHITENED
    assert pairs.route(GaussianMixture(shared.means, scale_tril=covariances), shared, "auto").formula == pairs.FULL


def test_more_dimensions_than_native_backends_have_take_the_reference() -> None:
    p = mixture("full", 2, backends.MAX_FULL_DIM + 1)
    assert pairs.route(p, p, "auto").eager
    with pytest.raises(NotImplementedError, match='backend "cpu" has full covariances up to D = 32, got D = 33'):
        pairs.route(p, p, "cpu")


def files_of_a_call(p: GaussianMixture, q: GaussianMixture) -> set[str]:
    """csdiv's Python files with a frame in a warm call."""
    package = Path(csdiv.__file__).parent
    files = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            files.add(f"csdiv/{path.relative_to(package)}")

    csdiv.cs_divergence(p, q)
    sys.setprofile(note)
    try:
        csdiv.cs_divergence(p, q)
    finally:
        sys.setprofile(None)
    return files


def test_the_map_lists_the_files_of_a_call() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Where a call goes")[2].partition("Two files hold")[0]
    listed = re.findall(r"^\| `(csdiv/[a-z_/]+\.py)` \|", section, re.MULTILINE)
    found = files_of_a_call(testing.random_mixture(3, 2), testing.random_mixture(4, 2))
    assert found == set(listed)
    assert len(found) <= 6


def test_a_backend_is_registered_by_an_object() -> None:
    cpu, calls = backends.resolve("cpu", torch.device("cpu")), []

    class Noted(backends.Backend):
        def forward(self, name, tensors, needs):
            calls.append(name)
            return cpu.forward(name, tensors, needs)

        def backward(self, name, grad, tensors, outputs, needs):
            calls.append(f"{name} backward")
            return cpu.backward(name, grad, tensors, outputs, needs)

        def assign(self, name, tensors):
            calls.append(name)
            return cpu.assign(name, tensors)

    p, q = (mixture("diagonal", k).map(lambda t: t.requires_grad_()) for k in (3, 4))
    with backends.registrations_restored():
        backends.register("noted", Noted, device="cpu")
        value = csdiv.component_log_overlap(p, q, backend="noted")
        (found,) = torch.autograd.grad(value.sum(), p.means)
        assert torch.equal(p.assign(q, backend="noted"), p.assign(q))
        with pytest.raises(NotImplementedError, match='backend "noted" has no full covariances'):
            csdiv.log_overlap(mixture("full"), backend="noted")
    assert calls == ["overlap_lse", "overlap_lse backward", "assign"]
    expected = csdiv.component_log_overlap(p, q)
    assert torch.equal(value, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), p.means)[0], rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="backend: one of 'auto', 'reference', 'cpu'"):
        csdiv.log_overlap(p, backend="noted")


def test_no_points_against_full_covariances() -> None:
    q = mixture("full")
    for backend in ("auto", "cpu", "reference"):
        assert q.log_prob(torch.zeros(0, 2, dtype=torch.float64), backend=backend).shape == (0,)
        assert q.assign(torch.zeros(0, 2, dtype=torch.float64), backend=backend).shape == (0,)


def test_a_backend_that_is_no_name_is_refused() -> None:
    p = mixture("diagonal")
    with pytest.raises(ValueError, match=r"backend: one of .* expected, got \['cpu'\]"):
        csdiv.log_overlap(p, backend=["cpu"])


def test_gpu_backends_have_no_gradients_of_rows_at_once() -> None:
    p, q = mixture("diagonal"), mixture("diagonal", 4)
    tensors = [p.means, p.variances, q.means, q.variances, q.log_weights]
    for name in ("emulation", "interpreter"):
        if name in csdiv.available_backends():
            with pytest.raises(NotImplementedError, match="backward pass alone"):
                backends.resolve(name, torch.device("cpu")).forward("overlap_lse", tensors, [True] * 5)


def test_auto_is_no_name_for_a_backend() -> None:
    with pytest.raises(ValueError, match='any but "auto"'):
        backends.register("auto", lambda: backends.resolve("cpu", torch.device("cpu")))
