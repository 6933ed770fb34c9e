"""Arguments that are refused, backends that are not there, and what surrounds a call: threads, workers, forks."""

import math
import os
import subprocess
import sys
import threading

import emulation
import gpu
import interpreter
import numpy as np
import ptx
import pytest
import torch
from entries import BACKENDS
from torch import Tensor

import csdiv
from csdiv import GaussianMixture, backends, testing

ABSENT = tuple(name for name in ("cpu", "cuda", "triton") if name not in csdiv.available_backends())
NATIVE = tuple(name for name in BACKENDS if name != "reference")

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def mixture(k: int = 4, d: int = 3, **options: object) -> GaussianMixture:
    return testing.random_mixture(k, d, **options)


# Covariances and weights


def factors(*shape: int) -> Tensor:
    return torch.eye(3).expand(*shape, 3, 3).clone()


@pytest.mark.parametrize(
    "wrong",
    [("zero", (2, 1, 1), 0.0), ("negative", (2, 1, 1), -1.0), ("nan", (2, 1, 1), math.nan)],
    ids=lambda w: w[0],
)
def test_scale_tril_that_is_no_cholesky_factor(wrong: tuple[str, tuple[int, ...], float]) -> None:
    matrices = factors(4)
    matrices[wrong[1]] = wrong[2]
    with pytest.raises(ValueError, match=r"scale_tril: a positive diagonal expected, component \(2,\) has none"):
        GaussianMixture(torch.zeros(4, 3), scale_tril=matrices)
    with pytest.raises(ValueError, match=r"component \(1, 2\) has none"):
        GaussianMixture(torch.zeros(2, 4, 3), scale_tril=torch.stack([factors(4), matrices]))


def test_covariance_that_is_not_symmetric_or_positive_definite() -> None:
    matrices = factors(4)
    matrices[3, 0, 1] = 0.5
    with pytest.raises(ValueError, match=r"covariance_matrix: symmetric matrices expected, component \(3,\) is not"):
        GaussianMixture(torch.zeros(4, 3), covariance_matrix=matrices)
    matrices = factors(4)
    matrices[1, 2, 2] = -1.0
    with pytest.raises(ValueError, match=r"covariance_matrix: positive definite expected, component \(1,\) is not"):
        GaussianMixture(torch.zeros(4, 3), covariance_matrix=matrices)
    matrices[1, 2, 2] = math.nan
    with pytest.raises(ValueError, match=r"covariance_matrix: .*component \(1,\) is not"):
        GaussianMixture(torch.zeros(4, 3), covariance_matrix=matrices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_covariance_symmetric_to_rounding_is_accepted(dtype: torch.dtype) -> None:
    r = torch.randn(5, 3, 3, dtype=torch.float64)
    covariance = r @ r.mT + torch.eye(3)
    covariance[:, 0, 1] *= 1.0 + torch.finfo(dtype).eps
    assert GaussianMixture(torch.zeros(5, 3, dtype=dtype), covariance_matrix=covariance.to(dtype)).structure == "full"


def test_exactly_one_covariance_and_at_most_one_weight() -> None:
    means, one, eye = torch.zeros(4, 3), torch.ones(1, 1), factors(1)
    with pytest.raises(ValueError, match="exactly one of variances, scale_tril, factor, covariance_matrix expected"):
        GaussianMixture(means)
    with pytest.raises(ValueError, match=r"exactly one of .* got variances and scale_tril"):
        GaussianMixture(means, one, scale_tril=eye)
    with pytest.raises(ValueError, match=r"exactly one of .* got scale_tril and covariance_matrix"):
        GaussianMixture(means, scale_tril=eye, covariance_matrix=eye)
    with pytest.raises(
        ValueError, match="at most one of weights, log_weights, logits expected, got log_weights and logits"
    ):
        GaussianMixture(means, one, log_weights=torch.zeros(4), logits=torch.zeros(4))


@pytest.mark.parametrize("name", ["means", "variances", "log_weights"])
def test_validate_names_the_first_bad_value(name: str) -> None:
    values = {"means": torch.zeros(2, 4, 3), "variances": torch.ones(2, 4, 3), "log_weights": torch.zeros(2, 4)}
    assert GaussianMixture(**values, validate=True).num_components == 4
    index = (1, 2) if name == "log_weights" else (1, 2, 0)
    values[name][index] = values[name][-1, -1] = math.nan
    with pytest.raises(ValueError, match=rf"{name}: .* got nan at index \({', '.join(map(str, index))}\)"):
        GaussianMixture(**values, validate=True)
    GaussianMixture(**values)  # not looked at by default


# Backends and names


@pytest.mark.parametrize("backend", ABSENT)
def test_absent_backend_by_name_is_refused_with_the_reason(backend: str) -> None:
    status = csdiv.backend_status()[backend]
    assert not status.available
    assert status.reason
    p = mixture()
    for call in (
        lambda: csdiv.cs_divergence(p, p, backend=backend),
        lambda: csdiv.log_overlap(p, backend=backend),
        lambda: p.log_prob(p.means, backend=backend),
        lambda: p.assign(p.means, backend=backend),
        lambda: csdiv.nn.CSDivergenceLoss(backend=backend)(p, p),
    ):
        with pytest.raises(RuntimeError) as raised:
            call()
        assert str(raised.value) == f'backend "{backend}" is not available: {status.reason}'
    assert csdiv.cs_divergence(p, p).isfinite()  # "auto" takes another


@pytest.mark.parametrize("backend", [name for name in (*NATIVE, *ABSENT) if not backends.has_full(name)])
def test_backend_without_full_covariances_refuses_them_by_name(backend: str) -> None:
    full = mixture(structure="full")
    with pytest.raises(NotImplementedError, match=f'backend "{backend}" has no full covariances'):
        csdiv.cs_divergence(full, mixture(), backend=backend)
    assert csdiv.cs_divergence(full, mixture()).isfinite()


def test_auto_takes_the_first_native_backend() -> None:
    p, q = mixture(), mixture()
    expected = csdiv.cs_divergence(p, q, backend="cpu" if "cpu" in BACKENDS else "reference")
    assert torch.equal(csdiv.cs_divergence(p, q), expected)


def test_status_names_every_backend() -> None:
    status = csdiv.backend_status()
    of_tests = {emulation.NAME, gpu.NAME, gpu.TRITON_NAME, interpreter.NAME, ptx.NAME}
    assert set(status) - of_tests == {"reference", "cpu", "cuda", "triton"}
    assert csdiv.available_backends() == tuple(name for name, s in status.items() if s.available)
    assert all(bool(s.reason) != s.available for s in status.values())


def test_unknown_names_list_the_valid_ones() -> None:
    p = mixture()
    for call in (
        lambda: csdiv.cs_divergence(p, p, backend="foo"),
        lambda: csdiv.log_overlap(p, backend="foo"),
        lambda: csdiv.component_log_overlap(p, p, backend="foo"),
        lambda: csdiv.pairwise_log_overlap(p, p, backend="foo"),
        lambda: csdiv.renyi2_entropy(p, backend="foo"),
        lambda: csdiv.cs_regularizer(p.means, p.variances, p, backend="foo"),
        lambda: p.responsibilities(p.means, backend="foo"),
        lambda: p.assign(p.means, backend="foo"),
        lambda: csdiv.nn.CSDivergenceLoss(backend="foo"),
    ):
        with pytest.raises(
            ValueError, match=r"backend: one of 'auto', 'reference', 'cpu', 'cuda', 'triton'.* expected, got 'foo'"
        ):
            call()
    with pytest.raises(ValueError, match="reduction: one of 'none', 'mean', 'sum' expected, got 'avg'"):
        csdiv.nn.CSDivergenceLoss("avg")


# Layouts of storage that are not dense


def test_tensors_that_are_not_dense() -> None:
    dense = torch.ones(3, 3)
    quantised = torch.quantize_per_tensor(dense, 0.1, 0, torch.quint8)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    for wrong, kind in ((dense.to_sparse(), "torch.sparse_coo"), (quantised, "quantised"), (nested, "nested")):
        with pytest.raises(NotImplementedError, match=f"means: a dense tensor expected, got a {kind} one"):
            GaussianMixture(wrong, torch.ones(1, 1))
        with pytest.raises(NotImplementedError, match="x: a dense tensor expected"):
            mixture().log_prob(wrong)


def test_numpy_arrays_are_accepted() -> None:
    p = mixture(dtype=torch.float64)
    arrays = [t.numpy() for t in (p.means, p.variances, p.log_weights)]
    q = testing.mixture_of(*arrays)
    assert torch.equal(csdiv.log_overlap(q), csdiv.log_overlap(p))
    assert torch.equal(q.log_prob(arrays[0]), p.log_prob(p.means))
    assert torch.equal(q.assign(arrays[0]), p.assign(p.means))
    with pytest.raises(TypeError, match="floating point expected"):
        GaussianMixture(np.ones((3, 3), dtype=np.int64), torch.ones(1, 1))


# Threads, workers and forks


@on_every_backend
def test_threads_get_the_same_results(backend: str) -> None:
    pairs = [(mixture(40 + i, 5), mixture(30, 5)) for i in range(8)]
    expected = [csdiv.cs_divergence(p, q, backend=backend) for p, q in pairs]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = [csdiv.cs_divergence(p, q, backend=backend) for _ in range(5) for p, q in pairs]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    assert all(torch.equal(a, b) for results in found.values() for a, b in zip(results, expected * 5, strict=True))
    assert len(found) == 4


_FORK = """
import os, signal, sys, torch, csdiv
from csdiv import testing
torch.set_num_threads(2)
p, q = (testing.random_mixture(600, 8).map(lambda t: t.requires_grad_()) for _ in range(2))
entry = getattr(csdiv, sys.argv[3])
def work():
    value = entry(p, q, backend=sys.argv[1]).sum()
    return torch.cat([value[None], torch.autograd.grad(value, p.means)[0].flatten()])
before = work()
child = os.fork()
if child == 0:
    signal.alarm(10)  # a hang ends the child by a signal
    torch.set_num_threads(int(sys.argv[2]))
    os._exit(0 if torch.equal(work(), before) else 1)
assert os.waitpid(child, 0)[1] == 0, "the child hung or differs"
assert torch.equal(work(), before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("backend", ["cpu"])  # another process
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("entry", ["cs_divergence", "log_overlap", "component_log_overlap"])
def test_fork_after_a_parallel_call(entry: str, backend: str, threads: str) -> None:
    command = [sys.executable, "-c", _FORK, backend, threads, entry]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_FORK_OF_TORCH = """
import os, signal, torch, csdiv
from csdiv import testing
torch.set_num_threads(2)
torch.randn(512, 512) @ torch.randn(512, 512)
child = os.fork()
if child == 0:
    signal.alarm(10)
    p, q = (testing.random_mixture(300, 8, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    os._exit(0 if csdiv.cs_divergence(p, q, backend="cpu").isfinite() else 1)
assert os.waitpid(child, 0)[1] == 0, "the child hung"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_first_call_in_a_fork_after_a_parallel_operator_of_torch() -> None:
    """PyTorch's threads, on which the kernels run otherwise, are not in the child."""
    done = subprocess.run(
        [sys.executable, "-c", _FORK_OF_TORCH], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class _Divergences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        p, q = (testing.random_mixture(200, 8, generator=generator) for _ in range(2))
        return csdiv.cs_divergence(p, q)


def test_data_loader_workers() -> None:
    data = _Divergences()
    here = torch.stack([data[i] for i in range(4)])
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, timeout=30)
    assert torch.equal(next(iter(loader)), here)
