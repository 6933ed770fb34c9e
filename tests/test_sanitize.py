"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every entry, size and instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import test_packaging
import torch
from test_native import supported_isas

import csdiv
from csdiv import testing

source_tree = test_packaging.source_tree  # a fixture

# 1, primes, tile ± 1: tiles have 16 rows, stripes 256 columns, vectors 2 to 16 lanes, groups 4 dimensions, blocks of
# dimensions 128. The large ones are cut in each of the three ways of csrc/cpu/sweep/gradient_sweep.h.
SIZES = [
    (1, 1, 1),
    (2, 3, 2),
    (7, 8, 3),
    (9, 7, 4),
    (15, 255, 5),
    (16, 256, 8),
    (17, 257, 7),
    (31, 16, 15),
    (33, 521, 2),
    (2, 9, 131),
    (1100, 3, 2),
    (5, 1103, 3),
    (277, 331, 1),
]
FULL_SIZES = [(1, 1, 1), (7, 8, 3), (17, 65, 9), (130, 17, 2), (2, 1100, 2), (1100, 3, 2), (300, 280, 3), (5, 9, 32)]
KINDS = ("plain", "-inf weights", "all -inf", "points", "1e±30", "far apart", "misaligned")
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((3,), ()),
    ((), (3,)),
    ((3, 1), (1, 2)),
    ((0,), ()),
    ((2,), (2,)),
    ((1,), (2,)),
]


def mixture(kind: str, size: int, dim: int, batch: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Means, variances and log weights."""
    made = testing.random_mixture(size, dim, batch_shape=batch, dtype=dtype, decades=30.0 if kind == "1e±30" else 0.3)
    means, variances, log_weights = made.means, made.variances, made.log_weights
    assert variances is not None
    assert log_weights is not None
    if kind == "-inf weights":
        log_weights[..., ::2] = -math.inf
    if kind == "all -inf":
        log_weights.fill_(-math.inf)
    if kind == "points":
        variances = torch.zeros(1, 1, dtype=dtype)
    if kind == "far apart":
        means = means * 1e19
    tensors = [means, variances, log_weights]
    if kind == "misaligned":
        tensors = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    return tensors


def call_every_entry(
    p_tensors: list[torch.Tensor], q_tensors: list[torch.Tensor], needs: str, backend: str = "cpu"
) -> None:
    for side, tensors in zip("pq", (p_tensors, q_tensors), strict=True):
        for t in tensors:
            t.requires_grad_(side in needs)
    p, q = testing.mixture_of(*p_tensors), testing.mixture_of(*q_tensors)
    log_variances = p_tensors[1].log().expand(p.means.shape)
    values = []
    for at_once in (mock.DEFAULT, False):  # gradients with the values, then by the backward pass
        with mock.patch.object(csdiv.autograd, "_has_all_items", wraps=csdiv.autograd._has_all_items) as decide:
            decide.return_value = at_once
            values += [
                csdiv.cs_divergence(p, q, backend=backend),
                csdiv.log_overlap(p, q, backend=backend),
                csdiv.log_overlap(q, backend=backend),
            ]
    values += [
        csdiv.component_log_overlap(p, q, backend=backend),
        csdiv.pairwise_log_overlap(p, q, backend=backend),
        csdiv.cs_regularizer(p.means, log_variances, q, backend=backend),
        q.log_prob(p.means, backend=backend),
        q.responsibilities(p.means, backend=backend),
    ]
    wanted = [t for t in (*p_tensors, *q_tensors) if t.requires_grad]
    for value in values:
        if value.requires_grad:
            torch.autograd.grad(value, wanted, torch.ones_like(value), allow_unused=True)
    q.assign(p.means, backend=backend)
    q.assign(p, backend=backend)


def call_every_entry_of_full_covariances(n: int, m: int, dim: int, needs: str, backend: str = "cpu") -> None:
    for structure, batch in (("full", ()), ("tied full", (2,)), ("diagonal", (0,))):
        sides = [
            testing.random_mixture(n, dim, structure=structure, batch_shape=batch),
            testing.random_mixture(m, dim, structure="full"),
        ]
        for name, side in zip("pq", sides, strict=True):
            for t in side._tensors():
                t.requires_grad_(name in needs)
        values = [
            entry(*sides, backend=backend)
            for entry in (csdiv.cs_divergence, csdiv.component_log_overlap, csdiv.pairwise_log_overlap)
        ]
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])
        sides[1].assign(sides[0], backend=backend)


def exercise() -> None:
    """What runs under the sanitizers; the results themselves are the contract's."""
    from csdiv import _C

    torch.manual_seed(0)
    print(_C.__file__)
    for isa in supported_isas():
        _C.cpu_set_isa(isa)
        for dtype in (torch.float32, torch.float64):
            for k, (n, m, dim) in enumerate(SIZES):
                torch.set_num_threads(1 + k % 2)
                for needs in ("pq", "pq"[k % 2]) if dtype == torch.float32 else ("pq",):
                    call_every_entry(mixture("plain", n, dim, (), dtype), mixture("plain", m, dim, (), dtype), needs)
            for k, kind in enumerate(KINDS):
                for n, m, dim in ((17, 33, 5), (16, 257, 9)):
                    torch.set_num_threads(1 + k % 2)
                    call_every_entry(mixture(kind, n, dim, (), dtype), mixture("plain", m, dim, (), dtype), "pq")
                    call_every_entry(mixture("plain", n, dim, (), dtype), mixture(kind, m, dim, (), dtype), "pq")
            for p_batch, q_batch in BATCHES:
                call_every_entry(mixture("plain", 5, 3, p_batch, dtype), mixture("plain", 19, 3, q_batch, dtype), "pq")
        for k, (n, m, dim) in enumerate(FULL_SIZES):
            torch.set_num_threads(1 + k % 2)
            call_every_entry_of_full_covariances(n, m, dim, ("pq", "p", "q")[k % 3])
        print(isa)


def sanitizer_runtimes() -> list[str]:
    """The compiler's libraries, to be loaded before Python; empty if it has none."""
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        libraries += [found] if os.path.isabs(found) else []
    return libraries if len(libraries) == 2 and sys.platform == "linux" else []


@pytest.mark.slow
@pytest.mark.skipif(not sanitizer_runtimes(), reason="the C++ compiler has no shared libasan and libubsan")
def test_no_entry_reads_or_writes_out_of_bounds_or_relies_on_undefined_behaviour(source_tree: Path) -> None:
    isas = supported_isas()
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = {"CSDIV_SANITIZE": "1", "CMAKE_ARGS": f"'-DCSDIV_ISAS={';'.join(isas)}'", "PATH": tools}
    test_packaging.run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source_tree, **options)
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "LD_PRELOAD": " ".join(sanitizer_runtimes()),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they allocate once
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(source_tree),
        },
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "Sanitizer" not in report, report
    assert "runtime error" not in report, report
    module, *exercised = done.stdout.split()
    assert Path(module).is_relative_to(source_tree)
    assert exercised == isas


if __name__ == "__main__":
    exercise()
