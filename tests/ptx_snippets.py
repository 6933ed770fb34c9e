"""Small kernels in PTX for tests of the machine: operands in, results out, a number for each lane."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

import ptx
import ptx_code
import torch
from torch import Tensor

HEAD = """
.version 9.0
.target sm_90
.address_size 64
"""
REGISTERS = """
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<19>;
.reg .f32 %f<9>;
.reg .b64 %rd<19>;
.reg .f64 %fd<9>;
"""


def kernel(body: str, *, shared_bytes: int = 0) -> str:
    """With the addresses of its tensors in %rd0, %rd1 …, as far as it uses them, and the thread in %r0."""
    count = max([0, *(1 + int(k) for k in re.findall(r"%rd([0-3])\b", body))])
    parameters = ", ".join(f".param .u64 a{k}" for k in range(count))
    loads = "".join(f"ld.param.u64 %rd{k}, [a{k}];\n" for k in range(count))
    shared = f".shared .align 16 .b8 memory[{shared_bytes}];\n" if shared_bytes else ""
    head = f"{HEAD}{shared}.visible .entry snippet({parameters})\n{{\n{REGISTERS}"
    return f"{head}mov.u32 %r0, %tid.x;\n{loads}{body}\nret;\n}}\n"


def run(
    text: str, inputs: Sequence[Tensor] = (), outputs: Sequence[Tensor] = (), *, blocks: int = 1, threads: int = 32
) -> list[str]:
    """Runs a kernel whose tensors are inputs, then outputs; the findings.

    Raises:
        ptx.Finding: the kernel cannot go on.
    """
    machine = ptx.machine()
    (found,) = ptx_code.kernels_of(text)
    machine.add(found, "snippet")
    machine.clear_buffers()
    machine.findings()
    for t in inputs:
        machine.add_buffer(t, written=True, read_only=True)
    for t in outputs:
        machine.add_buffer(t, written=False, read_only=False)
    machine.launch("snippet", blocks, threads, 0, [ctypes.c_uint64(t.data_ptr()) for t in (*inputs, *outputs)])
    return machine.findings()


def elementwise(opcode: str, operands: Sequence[Tensor], result: Tensor) -> Tensor:
    """What an opcode of 32 lanes gives, into ``result``."""
    registers = {torch.float32: ("f32", "%f"), torch.float64: ("f64", "%fd"), torch.int32: ("b32", "%r")}
    registers[torch.int64] = ("b64", "%rd")
    body = ["mul.wide.u32 %rd8, %r0, 4;", "mul.wide.u32 %rd9, %r0, 8;"]
    names = []
    for k, t in enumerate(operands):
        kind, register = registers[t.dtype]
        body.append(f"add.s64 %rd{10 + k}, %rd{k}, %rd{9 if t.itemsize == 8 else 8};")
        body.append(f"ld.global.{kind} {register}{5 + k}, [%rd{10 + k}];")
        names.append(f"{register}{5 + k}")
    kind, register = registers[result.dtype]
    names.insert(0, f"{register}4")
    body.append(f"{opcode} {', '.join(names)};")
    k = len(operands)
    body.append(f"add.s64 %rd{10 + k}, %rd{k}, %rd{9 if result.itemsize == 8 else 8};")
    body.append(f"st.global.{kind} [%rd{10 + k}], {names[0]};")
    assert not run(kernel("\n".join(body)), operands, [result])
    return result
