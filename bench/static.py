"""What the built CUDA kernels cost, read from their machine code: no GPU is needed.

The module is taken apart with cuobjdump and nvdisasm, of the CUDA toolkit or of the package triton. A hot loop is an
innermost loop that takes reciprocals (MUFU.RCP) and neither branches nor compares. Elements (i, j, d) are counted from
its own additions: two of each element, for c = s + t and for the difference of the means; besides these there are two
for each logarithm, and one for each number that is stored in shared memory, a sum.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from csdiv import _C

CLOCK_GHZ, PROCESSORS = 1.98, 132
"""Of an H200, at its highest clock; research figures of the bound assume it."""
MUFU_LANES = 16
"""Special functions of single threads per clock and multiprocessor."""
TF32_PRODUCTS = 512
"""Multiplications and additions of tensor cores per clock and multiprocessor; assumed, and to overlap with nothing."""
REGISTERS, SHARED_BYTES, WARPS = 65536, 227 * 1024, 64
"""Of a multiprocessor of compute capability 9.0."""
BLOCK_THREADS = 256
"""Of the kernels in csrc."""


def issue_lanes(capability: tuple[int, int]) -> int:
    """Single-precision instructions of single threads per clock and multiprocessor, by compute capability."""
    return 64 if capability in ((7, 5), (8, 0)) else 128


class Loop(NamedTuple):
    """An innermost loop with reciprocals: its instructions by name and the elements of an iteration."""

    counts: Counter[str]
    elements: int
    kind: str = ""  # "": to be told from the counts
    products: int = 0  # of an element, by tensor cores

    @property
    def instructions(self) -> float:
        """Per element."""
        return self.counts.total() / self.elements

    @property
    def special(self) -> float:
        """Reciprocals, logarithms and exponentials per element."""
        return sum(n for name, n in self.counts.items() if name.startswith("MUFU")) / self.elements

    @property
    def bound_tel_per_s(self) -> float:
        """Of an H200, if nothing but this loop took time."""
        clocks = max(self.instructions / issue_lanes((9, 0)), self.special / MUFU_LANES) + self.products / TF32_PRODUCTS
        return PROCESSORS * CLOCK_GHZ / clocks / 1e3


class Kernel(NamedTuple):
    """A kernel of the module for one architecture."""

    name: str
    architecture: str
    registers: int
    local_bytes: int
    loops: tuple[Loop, ...]
    threads: int = BLOCK_THREADS

    @property
    def resident_warps(self) -> int:
        """Of 64, as registers allow."""
        per_warp = -(-self.registers * 32 // 256) * 256
        warps = self.threads // 32
        return min(WARPS, REGISTERS // per_warp // warps * warps)


def tool(name: str) -> str:
    """Path of cuobjdump or nvdisasm.

    Raises:
        FileNotFoundError: there is none.
    """
    found = shutil.which(name)
    if nvcc := shutil.which("nvcc"):
        found = found or shutil.which(name, path=str(Path(nvcc).resolve().parent))
    if not found:
        from importlib.util import find_spec

        spec = find_spec("triton")
        folders = spec.submodule_search_locations if spec else None
        for folder in folders or ():
            found = found or shutil.which(name, path=str(Path(folder, "backends", "nvidia", "bin")))
    if not found:
        raise FileNotFoundError(f"no {name}: it comes with the CUDA toolkit, and with the package triton")
    return found


def output(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def readable(mangled: str) -> str:
    """``overlap_lse_backward_kernel<float, 32>`` of a mangled name."""
    match = re.search(r"\d([a-z_]+_kernel)(?:I([fd])?(?:Li(\d+)E)?)?", mangled)
    if not match:
        return mangled
    name, scalar, number = match.groups()
    arguments = [{"f": "float", "d": "double"}[scalar]] if scalar else []
    arguments += [number] if number else []
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def hot_loops(sass: str) -> Iterator[Loop]:
    """The innermost loops of a kernel that take reciprocals and neither branch nor compare numbers."""
    for counts in innermost_loops(sass):
        if counts["MUFU.RCP"] and not counts["BSSY"] and not counts["FSETP"]:
            yield Loop(counts, (counts["FADD"] - 2 * counts["MUFU.LG2"] - counts["STS"]) // 2)


def innermost_loops(sass: str) -> Iterator[Counter[str]]:
    """Their instructions by name."""
    lines = sass.splitlines()
    labels = {m[1]: k for k, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for k, line in enumerate(lines):
        target = re.search(r"BRA\b.*?(\.L_x_\d+)", line)
        if target and labels.get(target[1], k) < k:
            loops.append((labels[target[1]], k))
    for begin, end in loops:
        if any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops):
            continue
        counts = Counter[str]()
        for line in lines[begin : end + 1]:
            instruction = re.search(
                r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.(?:RCP|LG2|EX2)\b)?)", line
            )
            if instruction:
                counts[instruction[1]] += 1
        yield counts


def read(module: Path | None = None) -> list[Kernel]:
    """The kernels of the built module, for every architecture that has machine code.

    Raises:
        FileNotFoundError: no tools, see :func:`tool`.
        RuntimeError: the module has no CUDA kernels.
    """
    if module is None:
        module = Path(_C.__file__)
    cuobjdump = tool("cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([cuobjdump, "--extract-elf", "all", module.resolve()], cwd=folder, capture_output=True)
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise RuntimeError(f"{module.name} has no CUDA kernels: {_C.cuda_status}")
        kernels = [kernel for cubin in cubins for kernel in kernels_of(cubin, architecture_of(cubin.name))]
    return sorted(kernels, key=lambda kernel: (kernel.architecture, kernel.name))


def running_on(kernels: list[Kernel], capability: tuple[int, int]) -> list[Kernel]:
    """Those whose machine code runs on a GPU of this capability: for itself, or for an earlier one of its family."""
    major, minor = capability
    found: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        match = re.fullmatch(r"sm_(\d+)(\d)(a?)", kernel.architecture)
        if match and int(match[1]) == major and (int(match[2]) == minor or (int(match[2]) < minor and not match[3])):
            found.setdefault(int(match[2]), []).append(kernel)
    return found[max(found)] if found else []


def architecture_of(cubin: str) -> str:
    """Such as sm_90a, from the name that cuobjdump gives to a file."""
    match = re.search(r"\.(sm_\w+)\.cubin", cubin)
    if match is None:
        raise RuntimeError(f"{cubin} names no architecture")
    return match[1]


def kernels_of(cubin: Path, architecture: str) -> Iterator[Kernel]:
    """The kernels in a file of machine code."""
    usage = output(tool("cuobjdump"), "-res-usage", cubin)
    resources = {m[1]: m for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)}
    for section in re.split(r"\.section\s+\.text\.", output(tool("nvdisasm"), "-c", cubin))[1:]:
        name = section.split(",")[0].strip().strip('"')
        _, registers, stack = resources[name].groups()
        yield Kernel(readable(name), architecture, int(registers), int(stack), tuple(hot_loops(section)))


def records(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """One for each hot loop, one for a kernel that has none."""
    rows = []
    for kernel in kernels:
        row = {
            "kernel": kernel.name,
            "architecture": kernel.architecture,
            "registers": kernel.registers,
            "local_memory_bytes": kernel.local_bytes,
            "resident_warps": kernel.resident_warps,
        }
        rows += [
            row
            | {
                "loop": loop.kind or ("logits" if loop.counts["MUFU.LG2"] else "gradients"),
                "elements": loop.elements,
                "instructions_per_element": loop.instructions,
                "special_per_element": loop.special,
                "bound_tel_per_s": loop.bound_tel_per_s,
            }
            for loop in kernel.loops
        ] or [row]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The records as tables, one for each architecture."""
    lines = []
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        lines += [
            f"\n{architecture}: registers, bytes of local memory (spills among them), resident warps of {WARPS};",
            "of the hot loops instructions and special functions per element, and what an H200 could reach with these",
            f"alone ({PROCESSORS} multiprocessors at {CLOCK_GHZ} GHz)\n",
            "| kernel | registers | local | warps | loop | elements | instructions | special | bound Tel/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            if r["architecture"] != architecture:
                continue
            head = f"| {r['kernel']} | {r['registers']} | {r['local_memory_bytes']} | {r['resident_warps']} "
            loop = (
                f"| {r['loop']} | {r['elements']} | {r['instructions_per_element']:.2f} "
                f"| {r['special_per_element']:.2f} | {r['bound_tel_per_s']:.2f} |"
                if "loop" in r
                else "| | | | | |"
            )
            lines.append(head + loop)
    return "\n".join(lines)
