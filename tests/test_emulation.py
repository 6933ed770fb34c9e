"""The CUDA kernels on the host: nothing depends on the order of threads, and the emulation finds what it is for.

The contract itself holds "emulation" like every other backend, see test_contract.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import emulation
import pytest
import torch
from test_sanitize import call_every_entry, call_every_entry_of_full_covariances, mixture, sanitizer_runtimes

import csdiv
from csdiv import testing

CSRC = emulation.ROOT / "csrc"


@pytest.fixture
def native() -> Iterator[Any]:
    module = emulation.backend().native
    yield module
    module.set_order(module.Order.FORWARD)


def results(
    n: int, m: int, dim: int, dtype: torch.dtype, backend: str = emulation.NAME, structure: str = "diagonal"
) -> list[torch.Tensor]:
    """Values and gradients of every kernel."""
    g = torch.Generator().manual_seed(n + m)
    made = (testing.random_mixture(size, dim, structure=structure, dtype=dtype, generator=g) for size in (n, m))
    p, q = (side.map(torch.clone) for side in made)
    leaves = [t.requires_grad_() for side in (p, q) for t in side._tensors()]
    found = [q.assign(p, backend=backend)]
    for value in (
        csdiv.cs_divergence(p, q, backend=backend),
        csdiv.component_log_overlap(p, q, backend=backend),
        csdiv.pairwise_log_overlap(p, q, backend=backend),
        csdiv.cs_regularizer(p.means, p.means, q, backend=backend),
    ):
        grads = torch.autograd.grad(value, leaves, torch.ones_like(value), allow_unused=True)
        found += [value, *(grad for grad in grads if grad is not None)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (65, 63, 5), (70, 300, 9), (3, 5, 37), (64, 64, 32)])
def test_threads_in_any_order_give_the_same_bits(n: int, m: int, dim: int, dtype: torch.dtype, native: Any) -> None:
    runs = []
    for order in (native.Order.FORWARD, native.Order.REVERSE, native.Order.RANDOM):
        native.set_order(order)
        blocks = native.blocks_run()
        runs.append(results(n, m, dim, dtype))
        assert native.blocks_run() > blocks
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("n", "m", "dim"), [(1, 1, 1), (33, 7, 5), (5, 70, 3), (3, 5, 8), (7, 5, 11), (2, 3, 32)])
def test_threads_in_any_order_give_the_same_bits_of_full_covariances(n: int, m: int, dim: int, native: Any) -> None:
    runs = []
    for order in (native.Order.FORWARD, native.Order.REVERSE, native.Order.RANDOM):
        native.set_order(order)
        runs.append(results(n, m, dim, torch.float64, structure="full"))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(("n", "m"), [(20, 45), (1, 100), (100, 1)])
@pytest.mark.parametrize("dim", [2, 7])
def test_full_covariances_in_any_number_of_parts(n: int, m: int, dim: int) -> None:
    """On GPUs of other sizes the sums are cut in other ways: the same results but for rounding."""
    backend = emulation.backend()
    expected = results(n, m, dim, torch.float64, "cpu", "full")
    for count in (1, 132):
        with mock.patch.object(backend, "processors", return_value=count):
            for a, b in zip(results(n, m, dim, torch.float64, structure="full"), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("p_batch", "q_batch"), [((3,), ()), ((), (3,)), ((2, 1), (1, 3)), ((0,), ()), ((1,), (2,)), ((2, 2), (2,))]
)
def test_full_covariances_in_batches(p_batch: tuple[int, ...], q_batch: tuple[int, ...]) -> None:
    runs = []
    for backend in (emulation.NAME, "cpu"):
        g = torch.Generator().manual_seed(1)
        made = [
            testing.random_mixture(size, 3, structure=structure, batch_shape=batch, dtype=torch.float64, generator=g)
            for size, structure, batch in ((4, "tied full", p_batch), (7, "full", q_batch))
        ]
        p, q = (side.map(torch.clone) for side in made)
        leaves = [t.requires_grad_() for side in (p, q) for t in side._tensors()]
        values = [csdiv.cs_divergence(p, q, backend=backend), csdiv.pairwise_log_overlap(p, q, backend=backend)]
        runs.append([*values, *torch.autograd.grad([value.sin().sum() for value in values], leaves)])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dim", [5, 32])
@pytest.mark.parametrize("gradients", [1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(8192, 8192), (1, 10**6), (10**5, 100)])
def test_scratch_memory_of_full_covariances(n: int, m: int, dim: int, gradients: int) -> None:
    """A few times the inputs, and what a GPU's warps keep beside that."""
    native = emulation.backend().native
    p, q = ((256, 256, 256, 0, 1, size, False, False) for size in (n, m))
    sides = [(256 * wanted,) * 3 for wanted in (gradients & 1, gradients >> 1)]
    size = native.cuda_full_overlap_lse_backward(8, 1, dim, (256, 256), (p, q), tuple(sides), (0, 0, 132, 0))
    assert size <= 2 * 8 * (n + m) * (dim * dim + dim + 1) + 132 * 2**20


def scratch_bytes(function: str, n: int, m: int, dim: int, gradients: int, itemsize: int = 4) -> int:
    """What the function takes on a GPU of 132 multiprocessors; nothing runs, so that addresses may be of anything."""
    anything = 256
    native = emulation.backend().native
    p, q = ((anything, anything, anything, 0, 1, size, False, False) for size in (n, m))
    grads = tuple((anything * wanted,) * 3 for wanted in (gradients & 1, gradients >> 1))
    call = getattr(native, f"cuda_{function}_backward")
    arrays = (anything,) * (2 if function == "overlap_lse" else 3)
    arrays += (0, 0) if function == "regularizer" else ()  # the prior's self term is not known
    return call(itemsize, 1, dim, arrays, (p, q), grads, (0, 0, 132, 0))


@pytest.mark.parametrize("gradients", [1, 2, 3])
@pytest.mark.parametrize("function", ["cs_divergence", "overlap_lse", "log_overlap", "regularizer"])
@pytest.mark.parametrize(
    ("n", "m", "dim"), [(8192, 8192, 64), (1024, 100_000, 64), (100_000, 1024, 64), (10**6, 10**6, 64), (1, 10**6, 8)]
)
def test_scratch_memory_is_a_few_times_the_inputs(n: int, m: int, dim: int, function: str, gradients: int) -> None:
    inputs = 4 * (n + m) * (2 * dim + 1)
    most = (9 if function == "regularizer" else 8) if n + m > 10**5 else 20  # the prior is packed on two scales
    assert scratch_bytes(function, n, m, dim, gradients) <= most * inputs


# What is broken: file, the line, what it becomes, and what is found.
BUGS = {
    "no barrier before operands are read": (
        "tile_logits.h",
        "load_chunk(problem, tile, begin, dims, fast, rows_kept, shared);\n    __syncthreads();\n",
        "load_chunk(problem, tile, begin, dims, fast, rows_kept, shared);\n",
        "wrong results",
    ),
    "no barrier before the next tile is known": (
        "tile_logits.h",
        "++tile.row_tile;\n    __syncthreads();\n",
        "++tile.row_tile;\n",
        "wrong results|beyond|threads",
    ),
    "no barrier before sums are added to": (
        "gradient_sweep.cu",
        "shared.sums[e + k] = 0;\n  }\n  __syncthreads();\n",
        "shared.sums[e + k] = 0;\n  }\n",
        "wrong results",
    ),
    "a barrier that some threads do not reach": (
        "gradient_sweep.cu",
        "    __syncthreads();\n  }\n\n  // From the scaled",
        "    if (warp != 1) __syncthreads();\n  }\n\n  // From the scaled",
        "barrier",
    ),
    "shared memory that is too short": (
        "row_sums.cu",
        "sizeof(RowShared<T>), overlap",
        "sizeof(RowShared<T>) - 16, overlap",
        "shared memory",
    ),
    "a write beyond shared memory": (
        "totals.cu",
        "shared.sums[warp] = total.sum;",
        "shared.sums[warp + 1] = total.sum;",
        "beyond its shared memory",
    ),
    "no barrier before a pivot's row is read": (
        "full_pair.h",
        "__syncwarp();\n      const double pivot",
        "const double pivot",
        "wrong results",
    ),
    "a column of a full covariance too few": (
        "full_pair.h",
        "c >= live) break;",
        "c + 1 >= live) break;",
        "wrong results",
    ),
    "a mask that lets padding through": (
        "pack.cu",
        "T weight = k < components ? T(0) : -T(INFINITY);",
        "T weight = k <= components ? T(0) : -T(INFINITY);",
        "wrong results",
    ),
}


@pytest.fixture(scope="module")
def bug_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources and their build, in which every bug is built in turn: only what it touches."""
    folder = tmp_path_factory.mktemp("bugs")
    shutil.copytree(CSRC, folder / "csrc")
    return folder


def check_in_subprocess(module: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(module), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent, env=os.environ | environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_seeded_bugs_are_caught(bug: str, bug_folder: Path) -> None:
    file, before, after, finding = BUGS.get(bug, ("pack.cu", "", "", ""))
    source = bug_folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert bug == "none" or text.count(before) == 1, f"{file} has changed"
    source.write_text(text.replace(before, after))
    try:
        options = (f"-DCSRC={bug_folder / 'csrc'}", "-DCMAKE_BUILD_TYPE=Debug")
        done = check_in_subprocess(emulation.build(bug_folder / "build", *options))
    finally:
        source.write_text(text)
    if bug == "none":
        assert done.stdout.split() == ["right"], done.stderr
    else:
        assert done.returncode != 0
        last_line = done.stderr.splitlines()[-1]
        assert any(words in last_line for words in finding.split("|")), done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not sanitizer_runtimes(), reason="the C++ compiler has no shared libasan and libubsan")
def test_no_kernel_reads_or_writes_out_of_bounds(tmp_path: Path) -> None:
    module = emulation.build(tmp_path, "-DCSDIV_SANITIZE=ON")
    done = check_in_subprocess(
        module,
        "every entry",
        LD_PRELOAD=" ".join(sanitizer_runtimes()),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "Sanitizer" not in report, report
    assert "runtime error" not in report, report
    assert done.stdout.split() == ["right"]


def main() -> None:
    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    native = emulation.load(Path(sys.argv[1]))
    emulation.install(native)
    for order in (native.Order.FORWARD, native.Order.REVERSE, native.Order.RANDOM):
        native.set_order(order)
        for n, m, dim in ((65, 63, 5), (3, 130, 40), (64, 65, 32)):
            pairs = zip(*(results(n, m, dim, torch.float32, name) for name in (emulation.NAME, "cpu")), strict=True)
            assert all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs), "wrong results"
        for dim in (5, 7, 9):
            runs = (results(3, 10, dim, torch.float64, name, "full") for name in (emulation.NAME, "cpu"))
            assert all(torch.allclose(a, b) for a, b in zip(*runs, strict=True)), "wrong results"
    if len(sys.argv) > 2:
        for k, (n, m, dim) in enumerate(((1, 1, 1), (7, 8, 3), (2, 70, 5), (17, 9, 9), (5, 9, 32))):
            call_every_entry_of_full_covariances(n, m, dim, ("pq", "p", "q")[k % 3], emulation.NAME)
        for dtype in (torch.float32, torch.float64):
            for kind in ("plain", "-inf weights", "all -inf", "points", "1e±30", "far apart", "misaligned"):
                call_every_entry(*(mixture(kind, size, 5, (), dtype) for size in (17, 67)), "pq", emulation.NAME)
            for p_batch, q_batch in (((3,), ()), ((), (3,)), ((3, 1), (1, 2)), ((0,), ())):
                sides = (mixture("plain", 5, 3, p_batch, dtype), mixture("plain", 19, 3, q_batch, dtype))
                call_every_entry(*sides, "pq", emulation.NAME)
    print("right")


if __name__ == "__main__":
    main()
