"""What the Triton kernels cost, compiled and taken apart like those of the built module: no GPU is needed.

Every operator runs once on tensors of the CPU, where launches are written down in place of running; so what is compiled
is what would be, with the same options.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from . import static

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Of a program at most, by compute capability."""
SCALARS = {"float": torch.float32, "double": torch.float64}
ALONE: tuple[tuple[int, ...], ...] = ((), ())
SHARED = (((3,), ()), ((), (3,)), ((3, 1), (1, 2)))
"""Batch shapes of p and q. A side that problems share has an index, and kernels a variant for it."""

FORMS = ((3, "diagonal"), (3, "spherical"), (64, "spherical"), (3, "tied"), (64, "tied"), (3, "tied rows"))
"""D and a structure, so that every form of the pair term is taken."""


class Launch(NamedTuple):
    """A kernel as it is launched: the types of its arguments, constants, and options of the compiler."""

    name: str
    function: Any
    signature: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


def launch_of(scalar: str, function: Any, values: dict[str, Any]) -> Launch:
    """What triton makes of the arguments of a launch. Numbers are not specialised, or there would be more variants."""
    options = {name: value for name, value in values.items() if name not in function.arg_names}
    constants = {p.name: values[p.name] for p in function.params if p.is_constexpr or values[p.name] is None}
    signature: dict[str, Any] = {}
    for parameter in function.params:
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, int) and name not in constants and not parameter.do_not_specialize:
            raise ValueError(f"{function.__name__}: {name} would be specialised")
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
    flags = [name for name, value in constants.items() if value is True]
    form = [values["FORM"]] if values.get("FORM", "diagonal") != "diagonal" else []
    absent = [f"no {name}" for name, value in constants.items() if value is None and not name.endswith("index")]
    name = f"triton {function.__name__}<{', '.join([scalar, *form, *flags, *absent])}>"
    return Launch(name, function, signature, constants, options)


def launches(
    scalars: tuple[str, ...] = ("float", "double"),
    batches: tuple[Any, ...] = (ALONE,),
    forms: tuple[tuple[int, str], ...] = FORMS,
) -> list[Launch]:
    """Every launch of the backend on mixtures of these batch shapes, each variant of a kernel once.

    Raises:
        ImportError: there is no triton.
    """
    triton, backend = importlib.import_module("triton"), importlib.import_module("csdiv.backends.triton").backend
    found = dict[str, Launch]()

    def record(function: Any, *arguments: Any, grid: object, warmup: bool, **named: Any) -> None:
        launch = launch_of(scalar, function, dict(zip(function.arg_names, arguments, strict=False)) | named)
        found.setdefault(repr((launch.name, launch.signature, launch.constants)), launch)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(triton.JITFunction, "run", record))
        patches.enter_context(mock.patch.object(backend, "processors", return_value=static.PROCESSORS))
        patches.enter_context(mock.patch.object(backend, "capturing", return_value=False))
        patches.enter_context(mock.patch.object(backend, "current", return_value=contextlib.nullcontext()))
        for scalar in scalars:
            for p_batch, q_batch in batches:
                for dim, structure in forms:
                    call_every_operator(backend, p_batch, q_batch, SCALARS[scalar], dim, structure)
    return list(found.values())


def call_every_operator(
    backend: Any, p_batch: tuple[int, ...], q_batch: tuple[int, ...], dtype: torch.dtype, dim: int, structure: str
) -> None:
    """With all gradients, and with those of the weights alone."""
    diagonal, tied = (2, dim), (1, dim)
    variances = {"spherical": ((2, 1),) * 2, "tied": (tied, tied), "tied rows": (tied, diagonal)}
    p, q = (
        [torch.ones(*batch, *shape, dtype=dtype) for shape in ((2, dim), own, (2,))]
        for batch, own in zip((p_batch, q_batch), variances.get(structure, (diagonal,) * 2), strict=True)
    )
    for weights in (True, False):
        a, b = (side if weights else [*side[:2], None] for side in (p, q))
        needs = [True, True, weights]
        backend.forward("cs_divergence", a + b, needs + needs)
        backend.forward("log_overlap", a + b, needs + needs)
        backend.forward("self_overlap", a, needs)
        rows, _ = backend.forward("overlap_lse", a[:2] + b, [False] * 5)
        backend.backward("overlap_lse", rows[0], a[:2] + b, rows, [True, True, *needs])
    backend.forward("log_overlap", p + q, [False, False, True] * 2)
    densities, _ = backend.forward("pairwise", p[:2] + q[:2], [False] * 4)
    backend.backward("pairwise", densities[0], p[:2] + q[:2], [], [True] * 4)
    backend.assign("assign", p[:2] + q)


def compiled(launch: Launch, capability: int) -> static.Kernel:
    """The kernel's machine code for a compute capability such as 90, taken apart."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    aligned = {(k,): [["tt.divisibility", 16]] for k, kind in enumerate(launch.signature.values()) if kind[0] == "*"}
    source = compiler.ASTSource(launch.function, launch.signature, launch.constants, aligned)
    binary = importlib.import_module("triton").compile(source, target=target, options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        (kernel,) = static.kernels_of(cubin, f"sm_{capability}")
        sass = static.output(static.tool("nvdisasm"), "-c", cubin)
    if binary.metadata.shared > SHARED_BYTES[capability]:
        raise ValueError(f"{launch.name}: {binary.metadata.shared} bytes of shared memory for {capability}")
    # Additions do not tell the elements where an architecture packs two of them.
    loops = tuple(
        loop._replace(elements=loop.counts["MUFU.RCP"] * (4 if loop.counts["MUFU.LG2"] else 1)) for loop in kernel.loops
    )
    threads = 32 * launch.options["num_warps"]
    form = launch.constants.get("FORM", "diagonal")
    if form != "diagonal":
        pairs = launch.constants["BLOCK_N"] * 128 // threads
        loops = tuple(loops_of_form(sass, form.removesuffix(" matrix"), pairs))
    return kernel._replace(name=launch.name, loops=loops, threads=threads)


def loops_of_form(sass: str, structure: str, pairs: int) -> Iterator[static.Loop]:
    """The hot loops of a form that is not the diagonal one; ``pairs``: of a thread.

    Matrix products take 32 dimensions in an iteration. Besides these, spherical components have no reciprocal in such a
    loop and a difference for each element; tied ones have a reciprocal for each dimension.
    """
    for counts in static.innermost_loops(sass):
        kind = f"{structure} {'gradients' if counts['STG'] else 'logits'}"
        special = {name for name in counts if name.startswith("MUFU")}
        if any("MMA" in name for name in counts):
            yield static.Loop(counts, 32 * pairs, f"{structure} matrix logits", 3)
        elif counts["FSETP"] or counts["BSSY"]:
            continue
        elif structure == "spherical" and not special and counts["FFMA"] + counts["DFMA"] > 8:
            # Gradients store a sum for each dimension, and may add up rows apart from the differences.
            yield static.Loop(counts, counts["STG"] * pairs or counts["FADD"] or counts["DADD"], kind)
        elif structure != "spherical" and "MUFU.RCP" in special and counts["MUFU.RCP"] < pairs:
            yield static.Loop(counts, counts["MUFU.RCP"] * pairs, kind)


def read(capability: int = 90, scalars: tuple[str, ...] = ("float", "double")) -> list[static.Kernel]:
    """The kernels of problems without a batch.

    Raises:
        ImportError: there is no triton.
    """
    return [compiled(launch, capability) for launch in launches(scalars)]
