"""The machine code of the CUDA kernels: what an element costs, no local memory, every architecture."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench import static
from csdiv import _C

CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
TILE_KERNELS = ("overlap_lse_forward_kernel", "overlap_lse_backward_kernel", "assign_kernel", "pairwise_forward_kernel")
SWEEP = {32: 10.5, 16: 11.9, 8: 14.7}
"""Instructions of an element in the gradient sweep where so many lanes have a dimension each: 32 above D = 48."""
OFFSET = 0.25  # instructions of an element that the shared reference of logarithms may cost


def has_tools() -> bool:
    try:
        return all(static.tool(name) for name in ("cuobjdump", "nvdisasm"))
    except FileNotFoundError:
        return False


with_kernels = pytest.mark.skipif(not _C.has_cuda or not has_tools(), reason="no CUDA kernels, or no nvdisasm")


@with_kernels
def test_the_kernels_are_those_that_are_launched(kernels: list[static.Kernel]) -> None:
    sources = "".join(path.read_text() for path in CUDA_SOURCES.glob("*.cu"))
    launched = set(re.findall(r"launch\([^;]*?\b(\w+_kernel)[<,]", sources))
    assert {kernel.name.split("<")[0] for kernel in kernels} == launched
    for architecture in {kernel.architecture for kernel in kernels}:
        names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        assert len(names) == len(set(names))
        diagonal = [name for name in names if not name.startswith("full_")]
        assert len(diagonal) == 2 * len([name for name in launched if not name.startswith("full_")]) + 4  # in 3 widths
        for kernel in ("full_forward_kernel", "full_backward_kernel"):
            widths = {int(name.split("<")[1][:-1]) for name in names if name.startswith(kernel)}
            assert widths == {1, 2, 3, 4, 5, 8, 16, 32}


@with_kernels
def test_no_kernel_has_local_memory(kernels: list[static.Kernel]) -> None:
    assert [(k.name, k.architecture, k.local_bytes) for k in kernels if k.local_bytes] == []


@with_kernels
def test_two_blocks_of_full_covariances_are_resident_forward(kernels: list[static.Kernel]) -> None:
    """Up to 16 dimensions; the backward pass, with its sums in registers, has one."""
    for kernel in kernels:
        if kernel.name.startswith("full_forward") and not kernel.name.endswith("<32>"):
            assert kernel.resident_warps >= 16, kernel.name


@with_kernels
def test_what_an_element_costs(kernels: list[static.Kernel]) -> None:
    seen = set()
    for kernel in kernels:
        if not kernel.name.startswith(TILE_KERNELS) or "float" not in kernel.name:
            continue
        assert kernel.registers <= 128  # two blocks on a multiprocessor
        for loop in kernel.loops:
            grouped = loop.counts["MUFU.LG2"] > 0
            assert loop.elements == loop.counts["MUFU.RCP"] * (4 if grouped else 1)
            seen.add((kernel.name, grouped))
            if grouped:
                assert loop.instructions <= 7.0 + OFFSET, kernel.name
                assert loop.special <= 0.55, kernel.name
            else:
                lanes = int(re.search(r"(\d+)>", kernel.name)[1])
                assert loop.instructions <= SWEEP[lanes], kernel.name
    tile_kernels = {k.name for k in kernels if k.name.startswith(TILE_KERNELS) and "float" in k.name}
    sweeps = {name for name in tile_kernels if "backward" in name}
    assert seen == {(name, True) for name in tile_kernels} | {(name, False) for name in sweeps}


@pytest.mark.slow
@pytest.mark.skipif(not _C.has_cuda or not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("capability", ["75", "86", "89", "100", "120"])
def test_every_architecture_compiles_without_local_memory(capability: str, tmp_path: Path) -> None:
    """Of those that the build here does not have; the sources with tile kernels, in the hardest precision."""

    def compile_one(source: Path) -> str:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{capability}", "-Xptxas=-v", "-cubin", str(source)]
        done = subprocess.run([*command, "-o", str(tmp_path / source.stem)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    if capability not in subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout:
        pytest.skip(f"this nvcc does not know {capability}")
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(compile_one, sorted(CUDA_SOURCES.glob("*.cu"))))
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", "".join(reports))
    assert len(frames) >= 20
    assert set(frames) == {("0", "0")}
