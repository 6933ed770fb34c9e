"""What the process around a call does: it forks, its data loaders fork, and signals come."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import csdiv
from csdiv.testing import random_mixture

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

HANG = 60  # s, after which a child counts as hanging: each takes less than one, on a machine with nothing else
K = 192
DIM, FULL_DIM = 176, 14
"""Pairs, and the numbers of one side, are more than the 32,768 from which on PyTorch computes on several threads."""
STRUCTURES = ("diagonal", "spherical", "tied diagonal", "tied spherical", "full", "tied full", "float64", "bfloat16")


def make(structure: str, seed: int) -> csdiv.GaussianMixture:
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(structure, torch.float32)
    structure = structure if dtype == torch.float32 else "diagonal"
    dim = FULL_DIM if structure == "full" else DIM
    generator = torch.Generator().manual_seed(seed)
    return random_mixture(K, dim, structure=structure, generator=generator).to(dtype)


def entries(p: csdiv.GaussianMixture, q: csdiv.GaussianMixture) -> dict[str, Callable[[], Tensor]]:
    diagonal = p.variances is not None

    def sample() -> Tensor:
        torch.manual_seed(0)
        return q.rsample(3000)

    def channels() -> Tensor:
        labels = torch.arange(K) % 3
        weights = torch.nn.functional.one_hot(labels, 3).mT.to(p.dtype).log_softmax(-1)
        return csdiv.channel_log_overlap(p, q, weights, weights)

    def validated() -> Tensor:
        fields = ("means", "variances", "log_weights", "scale_tril")
        again = csdiv.GaussianMixture(**{name: getattr(p, name) for name in fields}, validate=True)
        return csdiv.log_overlap(again)

    found = {
        "cs_divergence": lambda: csdiv.cs_divergence(p, q),
        "log_overlap": lambda: csdiv.log_overlap(p, q),
        "renyi2_entropy": lambda: csdiv.renyi2_entropy(p),
        "component_log_overlap": lambda: csdiv.component_log_overlap(p, q),
        "pairwise_log_overlap": lambda: csdiv.pairwise_log_overlap(p, q),
        "cosine_similarity": lambda: csdiv.cosine_similarity(p, q),
        "ise": lambda: csdiv.ise(p, q, log=True),
        "nise": lambda: csdiv.nise(p, q),
        "mmd2": lambda: csdiv.mmd2(p, q, 1.0),
        "log_prob": lambda: q.log_prob(p.means),
        "responsibilities": lambda: q.responsibilities(p.means),
        "assign": lambda: q.assign(p.means),
        "assign mixture": lambda: q.assign(p),
        "sample": sample,
        "channels": channels,
        "validate": validated,
    }
    if diagonal:
        found["cs_regularizer"] = lambda: csdiv.cs_regularizer(p.means, p.means.sin(), q)
    return found


def results(structure: str, started: Callable[[str], object] = lambda _: None) -> list[Tensor]:
    """Each entry's value, and its gradients to the means and covariances."""
    p, q = (make(structure, seed).map(lambda t: t.requires_grad_()) for seed in (0, 1))
    inputs, found = [*p._tensors(), *q._tensors()], []
    for name, entry in entries(p, q).items():
        started(name)
        value = entry()
        found.append(value.detach())
        if value.requires_grad:
            gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
            found += [gradient for gradient in gradients if gradient is not None]
    return found


def in_fork(work: Callable[[Callable[[str], object]], bool], fork: Callable[[], int] = os.fork) -> str:
    """An empty string if ``work`` is true in a fork of this process, or else what it had started last."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(HANG)  # which ends a hanging child
        _end(work, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        started = pipe.read().splitlines()
    return "" if os.waitpid(child, 0)[1] == 0 else started[-1] if started else "nothing"


def _end(work: Callable[[Callable[[str], object]], bool], write: int) -> NoReturn:
    status = 1
    try:
        status = 0 if work(lambda name: os.write(write, f"{name}\n".encode())) else 1
    finally:
        os._exit(status)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_child_gets_the_same_bits(structure: str) -> None:
    expected = results(structure)
    assert in_fork(lambda started: same(results(structure, started), expected)) == ""


def test_child_of_a_child_gets_the_same_bits() -> None:
    p, q = make("tied full", 0), make("tied full", 1)
    expected = q.log_prob(p.means)

    def work(started: Callable[[str], object]) -> bool:
        return torch.equal(q.log_prob(p.means), expected)

    assert in_fork(lambda started: work(started) and in_fork(work) == "" and work(started)) == ""
    assert work(lambda _: None)


def test_forks_during_calls_of_another_thread() -> None:
    p, q, end = make("tied full", 0), make("tied full", 1), threading.Event()
    expected = q.log_prob(p.means)

    def call() -> None:
        while not end.is_set():
            q.log_prob(p.means)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for delay in range(8):
            time.sleep(0.001 * delay)
            assert in_fork(lambda _: torch.equal(q.log_prob(p.means), expected)) == ""
    finally:
        end.set()
        thread.join()


def test_forks_of_another_thread_than_the_first() -> None:
    p, q, found = make("tied full", 0), make("tied full", 1), []

    def call() -> None:
        expected = q.log_prob(p.means)
        found.append(in_fork(lambda _: torch.equal(q.log_prob(p.means), expected)))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert found == [""]


def test_child_that_python_does_not_know_of() -> None:
    """A fork by C code releases nothing: the kernels take threads of their own there."""
    p, q = make("diagonal", 0), make("diagonal", 1)
    expected = csdiv.cs_divergence(p, q)
    assert in_fork(lambda _: torch.equal(csdiv.cs_divergence(p, q), expected), fork=ctypes.PyDLL(None).fork) == ""


class _Results(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(STRUCTURES)

    def __getitem__(self, index: int) -> list[Tensor]:
        return results(STRUCTURES[index])


def test_data_loader_workers_get_the_same_bits() -> None:
    data = _Results()
    torch.set_num_threads(1)  # as in a worker: PyTorch's own sums depend on it
    expected = [data[k] for k in range(len(data))]
    torch.set_num_threads(2)
    results("full")
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, timeout=HANG, multiprocessing_context="fork"
    )
    for found, values in zip(loader, expected, strict=True):
        assert same(found, values)


# Signals


def _diagonal(*shape: int) -> csdiv.GaussianMixture:
    means = torch.randn(shape)
    return csdiv.GaussianMixture(means, means.sin() + 1.5)


def _full(n: int, dim: int) -> csdiv.GaussianMixture:
    return random_mixture(n, dim, structure="full")


def _gradients(p: csdiv.GaussianMixture, q: csdiv.GaussianMixture) -> None:
    csdiv.cs_divergence(p.map(lambda t: t.requires_grad_()), q).sum().backward()


LONG: dict[str, tuple[Callable[..., object], Callable[..., csdiv.GaussianMixture], tuple[int, ...], int]] = {
    "overlap": (csdiv.log_overlap, _diagonal, (60_000, 64), 60_000),
    "self": (lambda p, _: csdiv.log_overlap(p), _diagonal, (90_000, 64), 1),
    "few rows": (csdiv.log_overlap, _diagonal, (600, 64), 2_000_000),
    "pairwise": (csdiv.pairwise_log_overlap, _diagonal, (4_000, 4_096), 4_000),
    "assign": (csdiv.GaussianMixture.assign, _diagonal, (60_000, 64), 60_000),
    "gradients": (_gradients, _diagonal, (60_000, 64), 60_000),
    "two problems": (_gradients, _diagonal, (2, 45_000, 64), 45_000),
    "full": (csdiv.log_overlap, _full, (4_000, 32), 4_000),
    "full gradients": (_gradients, _full, (3_000, 32), 3_000),
}
"""Calls of 5 s to minutes: an entry, what makes its sides, the shape of the means of p, and the components of q."""


def long_call(name: str) -> Callable[[], object]:
    entry, mixture, shape, m = LONG[name]
    p, q = mixture(*shape), mixture(*shape[:-2], m, shape[-1])
    return lambda: entry(p, q)


class _LongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.call = long_call("overlap")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.call()
        return grad


class _Stop(Exception):
    pass


def _time_to_end(call: Callable[[], object], number: int, error: type[BaseException]) -> float:
    """Seconds from a signal, which comes while the call is under way, to the error that its handler raises."""
    sent = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), number)

    timer = threading.Timer(0.25, send)
    timer.start()
    try:
        with pytest.raises(error):
            call()
        return time.perf_counter() - sent[0]
    finally:
        timer.join()


@pytest.fixture
def stop_on_sigterm() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A process that was started in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("name", LONG)
def test_interrupt_ends_a_long_call(name: str) -> None:
    p, q = make("diagonal", 0), make("diagonal", 1)
    expected = csdiv.cs_divergence(p, q)
    assert (
        _time_to_end(long_call(name), signal.SIGINT, KeyboardInterrupt) < 1.0
    )  # 0.2 s, on a machine with nothing else
    assert torch.equal(csdiv.cs_divergence(p, q), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_handler_that_raises_ends_a_backward_pass(threads: int, stop_on_sigterm: None) -> None:
    torch.set_num_threads(threads)
    value = _LongBackward.apply(torch.zeros((), requires_grad=True))
    assert _time_to_end(value.backward, signal.SIGTERM, _Stop) < 1.0


@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_handler_may_call_csdiv_in_the_middle_of_a_call(structure: str) -> None:
    """Both calls have the thread's memory to themselves; the first goes on when the handler returns."""
    if structure == "full":
        p, q = _full(700, 16), _full(700, 16)
    else:
        p, q = _diagonal(8_000, 64), _diagonal(8_000, 64)
    inner = random_mixture(700, 96 if structure == "diagonal" else 24, structure=structure)
    outside, expected, found = csdiv.log_overlap(inner), csdiv.log_overlap(p, q), []

    def call(*_: object) -> None:
        found.append(csdiv.log_overlap(inner))

    before = signal.signal(signal.SIGALRM, call)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        assert torch.equal(csdiv.log_overlap(p, q), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert same(found, [outside])


def test_call_of_another_thread_is_not_ended(stop_on_sigterm: None) -> None:
    p, q, found = _diagonal(8_000, 64), _diagonal(8_000, 64), []
    expected = csdiv.log_overlap(p, q)
    thread = threading.Thread(target=lambda: found.append(csdiv.log_overlap(p, q)))

    def wait() -> None:
        thread.start()
        time.sleep(10)

    assert _time_to_end(wait, signal.SIGTERM, _Stop) < 1.0
    thread.join()
    assert same(found, [expected])
