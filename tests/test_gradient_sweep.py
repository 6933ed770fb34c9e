"""The CUDA gradient sweep beyond its results: how work is cut, round trips to memory, bank conflicts."""

import re
import subprocess
from pathlib import Path

import emulation
import ptx
import pytest
import torch
from test_static import with_kernels

import csdiv
from bench import partition, static
from bench.partition import Cut, Sum
from csdiv import _C, testing

H200 = 132


def cuts(sums: list[Sum], dim: int, processors: int = H200, itemsize: int = 4) -> list[Cut]:
    native = emulation.backend().native
    sizes = [(of.batch, of.n, of.m, of.itself) for of in sums]
    return [Cut(*found) for found in native.cuda_partitions(itemsize, dim, sizes, processors)]


def divergence(n: int, m: int) -> list[Sum]:
    return [Sum(n, m), Sum(n, n, True), Sum(m, m, True)]


@pytest.mark.parametrize(
    ("sums", "dim"),
    [
        ([Sum(8192, 8192)], 64),
        ([Sum(1024, 100_000)], 64),
        ([Sum(100_000, 1024)], 64),
        ([Sum(2048, 2048)], 128),
        ([Sum(1024, 1024)], 32),
        ([Sum(30_000, 30_000)], 64),
        ([Sum(128, 500, batch=64)], 40),
        ([Sum(8192, 8192, True)], 64),
        ([Sum(5000, 5000, True)], 16),
        ([Sum(4096, 4096, True)], 16),
        (divergence(8192, 8192), 64),
        (divergence(5000, 5000), 16),
        (divergence(2048, 2048), 128),
        (divergence(1024, 1024), 32),
    ],
)
def test_blocks_fill_the_multiprocessors(sums: list[Sum], dim: int) -> None:
    for itemsize in (4, 8):
        cut = cuts(sums, dim, itemsize=itemsize)
        assert partition.efficiency(sums, cut, H200, itemsize) >= 0.85
        least = sum(of.batch * (of.n + of.m) for of in sums) * (2 * dim + 1) * 8
        assert partition.copies_bytes(sums, cut, dim) <= max(1.35 * least, H200 * 2**20)


@pytest.mark.parametrize("processors", [1, 2, 7, 108])
@pytest.mark.parametrize("sums", [[Sum(1, 1)], [Sum(70, 5000)], [Sum(3000, 3000, True)], divergence(900, 40), []])
def test_every_tile_is_in_one_block(sums: list[Sum], processors: int) -> None:
    sums = sums or [Sum(130, 64, batch=7)]
    for itemsize, dim in ((4, 3), (8, 200)):
        columns = 256 // itemsize
        cut = cuts(sums, dim, processors, itemsize)
        assert len({of.phases for of in cut}) == 1
        for of, its in zip(sums, cut, strict=True):
            assert its.row_ranges % its.phases == its.column_ranges % its.phases == 0
            tiles = [partition.block_tiles(of, its, phase, columns) for phase in range(its.phases)]
            rows = range(-(-of.n // 64))
            first = [r * (64 // columns) if of.itself else 0 for r in rows]
            assert sum(map(sum, tiles)) == of.batch * sum(-(-of.m // columns) - at for at in first)


def sequences(sass: str) -> list[str]:
    """Accesses to global memory of 64 bits between barriers, in their order: L and S."""
    found = [""]
    for line in sass.splitlines():
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line)
        if match and match[1].startswith("BAR"):
            found.append("")
        elif match and (access := re.match(r"(LD|ST)G?\.E\.64", match[1])):
            found[-1] += access[1][0]
    return found


def machine_code(folder: Path) -> list[tuple[str, str, str]]:
    """Architecture, name and machine code of every kernel of the built module."""
    command = [static.tool("cuobjdump"), "--extract-elf", "all", str(Path(_C.__file__).resolve())]
    subprocess.run(command, cwd=folder, capture_output=True, check=False)
    return [
        (static.architecture_of(cubin.name), static.readable(section.split(",")[0]), section)
        for cubin in folder.glob("*.cubin")
        for section in re.split(r"\.section\s+\.text\.", static.output(static.tool("nvdisasm"), "-c", cubin))[1:]
    ]


@with_kernels
def test_no_load_of_sums_waits_for_a_store(tmp_path: Path) -> None:
    """A dimension's sums of rows come in one round trip to memory, those of columns in another."""
    seen = 0
    for architecture, name, sass in machine_code(tmp_path):
        if "overlap_lse_backward_kernel" in name:
            most = max(len(re.findall("SL", sequence)) for sequence in sequences(sass))
            assert most <= 2, (architecture, name)
            seen += 1
    assert seen >= 6


@pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("lanes", "dim"), [(32, 29), (16, 13), (8, 7)])
def test_shared_memory_has_no_bank_conflicts(lanes: int, dim: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(dim)
    p, q = (testing.random_mixture(n, dim, dtype=dtype, generator=g) for n in (70, 128))
    backend = ptx.backend()
    scalar = "f" if dtype == torch.float32 else "d"
    (name,) = (k for k in backend.machine.kernels if f"overlap_lse_backward_kernelI{scalar}Li{lanes}E" in k)
    backend.machine.clear_counts()
    csdiv.log_overlap(p.map(torch.clone), q.map(lambda t: t.clone().requires_grad_()), backend=ptx.NAME).backward()
    lines = [line for line in backend.machine.counts(name) if line.cycles]
    cycles, ideal = sum(line.cycles for line in lines), sum(line.ideal_cycles for line in lines)
    assert ideal > 0
    assert cycles <= 1.03 * ideal, [line for line in lines if line.cycles > line.ideal_cycles]
