"""The CPU kernels as a machine part: instruction sets, threads, fork, argument checks; results: test_contract.py."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch

import csdiv
from csdiv import _C, testing
from csdiv.testing import random_mixture

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu" / "kernels"
ALLOWED = {"<cstdint>", "<immintrin.h>", "<type_traits>", "<utility>", '"isas.h"'}
"""What kernels may include besides each other: no code that two instruction sets could share; see KERNELS/README.md."""


def supported_isas():
    widest = _C.cpu_isa()
    names = []
    for name in _C.cpu_isas():
        try:
            _C.cpu_set_isa(name)
        except ValueError as error:
            assert "does not support" in str(error)  # noqa: PT017
        else:
            names.append(name)
    _C.cpu_set_isa(widest)
    return names


def results(p, q):
    tensors = [
        t.clone().requires_grad_() for t in (p.means, p.variances, p.log_weights, q.means, q.variances, q.log_weights)
    ]
    left, right = testing.mixture_of(*tensors[:3]), testing.mixture_of(*tensors[3:])
    values = [
        csdiv.cs_divergence(left, right, backend="cpu"),
        csdiv.component_log_overlap(left, right, backend="cpu"),
        csdiv.pairwise_log_overlap(left, right, backend="cpu"),
    ]
    grads = torch.autograd.grad([v.sum() for v in values], tensors)
    return [*values, *grads, left.assign(right, backend="cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decades", [0.3, 12.0])  # the shared-reciprocal form, and the exact one
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (17, 33, 5), (16, 256, 4), (40, 300, 9), (33, 513, 64)])
def test_instruction_sets_agree(isa, dtype, decades, n, m, d):
    generator = torch.Generator().manual_seed(n + m + d)
    make = {"dtype": dtype, "decades": decades, "generator": generator}
    p, q = random_mixture(n, d, **make), random_mixture(m, d, **make)
    names = supported_isas()
    assert "baseline" in names
    isa(names[0])
    expected = results(p, q)
    for name in names[1:]:
        isa(name)
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-13}[dtype]
        for actual, wanted in zip(results(p, q), expected, strict=True):
            scale = wanted[wanted.isfinite()].abs().amax() if wanted.isfinite().any() else 1.0
            assert torch.equal(actual.isfinite(), wanted.isfinite())
            difference = (actual - wanted)[wanted.isfinite()].abs()
            assert difference.numel() == 0 or difference.amax() <= tolerance * max(1.0, scale)


@pytest.mark.parametrize("name", supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_right_to_the_last_bits(isa, name, dtype):
    """c = 1 and equal means leave log b_j as logits, and shares e^(log b_j) / sum as their gradients."""
    isa(name)
    lowest = {torch.float32: -100, torch.float64: -720}[dtype]
    log_weights = torch.linspace(0, lowest, 20_000, dtype=torch.float64).to(dtype).requires_grad_()
    means, halves = torch.zeros(20_000, 1, dtype=dtype), torch.full((20_000, 1), 0.5, dtype=dtype)
    q = csdiv.GaussianMixture(means, halves, log_weights=log_weights)
    rows = csdiv.component_log_overlap(csdiv.GaussianMixture(means[:1], halves[:1]), q, backend="cpu")
    (shares,) = torch.autograd.grad(rows.sum(), log_weights)
    exact = log_weights.detach().double().softmax(0)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    normal = exact > 1.01 * tiny
    factor = (shares[0] / exact[0]).item()  # of the sum
    allowed = 3 * eps + torch.finfo(torch.float64).eps * log_weights.detach().abs()  # factors of stripes are float64
    assert ((shares / factor / exact - 1).abs() <= allowed)[normal].all()
    assert (shares[exact < 0.99 * tiny * exact[0]] == 0).all()


@pytest.mark.parametrize("name", supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithms_are_right_to_the_last_bits(isa, name, dtype):
    """Of c, which equal means leave; c near 1, and over 36 powers of two, more than any table or series tells apart."""
    isa(name)
    c = torch.cat([2.0 ** torch.linspace(-18, 18, 40_000), 1 + torch.linspace(-1e-3, 1e-3, 2001)])
    halves = (c.double() / 2).to(dtype).unsqueeze(-1)
    means = torch.zeros_like(halves)
    q, p = csdiv.GaussianMixture(means, halves), csdiv.GaussianMixture(means[:1], torch.full((1, 1), 0.0, dtype=dtype))
    found = csdiv.pairwise_log_overlap(p, q, backend="cpu")[0]
    logs = halves[:, 0].double().log() + math.log(2 * math.pi)
    eps = torch.finfo(dtype).eps
    assert ((found + 0.5 * logs).abs() <= 2 * eps * (1 + 0.5 * logs.abs())).all()


def foreign_includes(folder):
    """(file, header) of what is neither allowed nor the folder's own, in all that is compiled per instruction set."""
    (sources,) = re.findall(r"add_library\(csdiv_\S+ OBJECT (.*)\)", (ROOT / "CMakeLists.txt").read_text())
    waiting, seen, found = [Path(source).name for source in sources.split()], set(), set()
    while waiting:
        seen.add(name := waiting.pop())
        for header in re.findall(r"^\s*#\s*include\s*(\S+)", (folder / name).read_text(), re.MULTILINE):
            if header.startswith('"') and (folder / header.strip('"')).exists():
                waiting += {header.strip('"')} - seen
            elif header not in ALLOWED:
                found.add((name, header))
    assert {"tile.h", "simd.h"} < seen
    return found


def test_kernels_include_nothing_that_the_linker_could_merge(tmp_path):
    assert foreign_includes(KERNELS) == set()
    shutil.copytree(KERNELS, tmp_path / "kernels")
    with (tmp_path / "kernels" / "simd.h").open("a") as header:
        header.write("#include <vector>\n")
    assert foreign_includes(tmp_path / "kernels") == {("simd.h", "<vector>")}


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match='no instruction set "sse9" was compiled in'):
        _C.cpu_set_isa("sse9")


def _work(seed):
    generator = torch.Generator().manual_seed(seed)
    p = random_mixture(600, 8, generator=generator)
    p = csdiv.GaussianMixture(p.means.requires_grad_(), p.variances, log_weights=p.log_weights)
    q = random_mixture(700, 8, generator=generator)
    value = csdiv.cs_divergence(p, q, backend="cpu")
    return value.item(), torch.autograd.grad(value, p.means)[0].sum().item()


def _child(queue):
    queue.put(_work(0))


def test_fork_after_a_parallel_call_does_not_hang():
    torch.set_num_threads(2)
    expected = _work(0)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(10)
    try:
        assert child.exitcode == 0
        assert queue.get() == expected
    finally:
        child.kill()
    assert _work(0) == expected  # the parent's threads still work


@pytest.mark.parametrize(("n", "m", "batch", "shared"), [(300, 300, 3, True), (64, 2000, 1, False)])
def test_sums_that_problems_or_blocks_share_are_the_same_bits_with_two_threads(n, m, batch, shared):
    generator = torch.Generator().manual_seed(0)
    p = random_mixture(n, 3, batch_shape=() if shared else (batch,), generator=generator)
    q = random_mixture(m, 3, batch_shape=(batch,), generator=generator)
    tensors = [t.requires_grad_() for side in (p, q) for t in (side.means, side.variances, side.log_weights)]

    def gradients(threads):
        torch.set_num_threads(threads)
        value = csdiv.log_overlap(testing.mixture_of(*tensors[:3]), testing.mixture_of(*tensors[3:]), backend="cpu")
        return torch.autograd.grad(value.sum(), tensors)

    expected = gradients(1)
    for _ in range(20):
        assert all(map(torch.equal, gradients(2), expected))


def test_concurrent_callers_get_their_own_results():
    expected = [_work(seed) for seed in range(4)]
    found = [None] * 4

    def call(k):
        for _ in range(3):
            found[k] = _work(k)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_bad_arguments_are_refused_before_anything_is_read():
    side, none = (8, 8, 0, 0, 1, 1, False, False), ((0, 0, 0), (0, 0, 0))

    def call(itemsize: int, batch: int, dim: int, p: tuple[int, ...], q: tuple[int, ...] = side) -> None:
        _C.cpu_overlap_lse_forward(itemsize, batch, dim, (8, 8), (p, q), none, 1)

    with pytest.raises(ValueError, match="itemsize must be 4 or 8"):
        call(2, 1, 1, side)
    with pytest.raises(ValueError, match="null"):
        call(4, 1, 1, (0, *side[1:]))
    with pytest.raises(ValueError, match="too large"):
        call(4, 1, 2**21, (8, 8, 0, 0, 1, 2**50, False, False))
    with pytest.raises(ValueError, match="must be positive"):
        call(4, 1, 0, side)
    with pytest.raises(ValueError, match="8 fields"):
        call(4, 1, 1, side[:5])
    with pytest.raises(ValueError, match="index is missing"):
        call(4, 3, 1, (8, 8, 0, 0, 2, 1, False, False))
    for arrays, sides, grads, message in (
        ((8,), (side, side), none, "as many arrays"),
        ((8,) * 3, (side, side), none, "as many arrays"),
        ((8, 0), (side, side), none, "null"),
        ((8, 8), (side,), none, "p and q"),
        ((8, 8), (side, side), none[:1], "p and q"),
        ((8, 8), (side, side), ((0, 0), (0, 0, 0)), "3 fields"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.cpu_overlap_lse_forward(4, 1, 1, arrays, sides, grads, 1)


def test_a_second_copy_of_the_module_loads_beside_the_first(tmp_path):
    """As bench gpu loads a build of its own."""
    copy = shutil.copy(_C.__file__, tmp_path)
    spec = importlib.util.spec_from_file_location("another._C", copy)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Arithmetic is not _C.Arithmetic
