"""The machine that executes PTX: opcodes against numpy, and that it finds what it is there to find."""

from collections.abc import Callable
from typing import Any

import numpy as np
import ptx
import ptx_code
import pytest
import torch
from numpy.typing import NDArray
from ptx_snippets import elementwise, kernel, run

Array = NDArray[Any]
LANES = 32


def numbers(kind: str, k: int) -> Array:
    """Random ones, small and large, with what is special."""
    random = np.random.default_rng(k)
    if kind[0] == "f":
        values = random.normal(size=LANES) * np.exp2(random.integers(-20, 20, LANES))
        values[:6] = (0.0, -0.0, np.inf, -np.inf, np.nan, 1.0)
        return random.permutation(values).astype(f"f{int(kind[1:]) // 8}")
    bits = int(kind[1:])
    values = random.integers(0, 2**32, LANES, dtype="u8") << np.uint64(bits - 32) | np.uint64(17 + k)
    values[:8] = [0, 1, 2, 3, 31, 2**31, 2**32 - 1, 2 ** (bits - 1)]
    return random.permutation(values).astype(f"u{bits // 8}").view(f"{kind[0]}{bits // 8}".replace("s", "i"))


def shifted(a: Array, n: Array) -> Array:
    return np.where(n >= 32, np.uint32(0), a << (n % 32)).astype("u4")


def shifted_right(a: Array, n: Array) -> Array:
    return np.where(n >= 32, a >> 31, a >> (n % 32)).astype("i4")


CASES: list[tuple[str, str, tuple[str, ...], Callable[..., Array]]] = [
    ("add.f32", "f32", ("f32", "f32"), np.add),
    ("sub.rn.f64", "f64", ("f64", "f64"), np.subtract),
    ("mul.rn.f32", "f32", ("f32", "f32"), np.multiply),
    ("div.rn.f64", "f64", ("f64", "f64"), np.divide),
    ("min.f32", "f32", ("f32", "f32"), np.fmin),
    ("max.f64", "f64", ("f64", "f64"), np.fmax),
    ("neg.f32", "f32", ("f32",), np.negative),
    ("abs.f64", "f64", ("f64",), np.abs),
    ("sqrt.rn.f32", "f32", ("f32",), np.sqrt),
    ("add.s32", "s32", ("s32", "s32"), np.add),
    ("sub.s64", "s64", ("s64", "s64"), np.subtract),
    ("mul.lo.s32", "s32", ("s32", "s32"), np.multiply),
    ("mul.lo.s64", "s64", ("s64", "s64"), np.multiply),
    ("mul.wide.s32", "s64", ("s32", "s32"), lambda a, b: a.astype("i8") * b),
    ("mul.wide.u32", "u64", ("u32", "u32"), lambda a, b: a.astype("u8") * b),
    ("mul.hi.u32", "u32", ("u32", "u32"), lambda a, b: (a.astype("u8") * b >> np.uint64(32)).astype("u4")),
    ("mul.hi.s32", "s32", ("s32", "s32"), lambda a, b: (a.astype("i8") * b >> 32).astype("i4")),
    ("mad.lo.s32", "s32", ("s32", "s32", "s32"), lambda a, b, c: a * b + c),
    ("mad.wide.u32", "u64", ("u32", "u32", "u64"), lambda a, b, c: a.astype("u8") * b + c),
    ("min.s32", "s32", ("s32", "s32"), np.minimum),
    ("max.u32", "u32", ("u32", "u32"), np.maximum),
    ("and.b32", "u32", ("u32", "u32"), np.bitwise_and),
    ("xor.b64", "u64", ("u64", "u64"), np.bitwise_xor),
    ("not.b32", "u32", ("u32",), np.bitwise_not),
    ("shl.b32", "u32", ("u32", "u32"), shifted),
    ("shr.s32", "s32", ("s32", "u32"), shifted_right),
    ("popc.b32", "s32", ("u32",), np.bitwise_count),
    ("cvt.rn.f32.f64", "f32", ("f64",), lambda a: a.astype("f4")),
    ("cvt.f64.f32", "f64", ("f32",), lambda a: a.astype("f8")),
    ("cvt.rn.f32.s32", "f32", ("s32",), lambda a: a.astype("f4")),
    ("cvt.rn.f64.s64", "f64", ("s64",), lambda a: a.astype("f8")),
    ("cvt.s64.s32", "s64", ("s32",), lambda a: a.astype("i8")),
    ("cvt.s64.s32", "s64", ("s64",), lambda a: a.astype("i4").astype("i8")),  # of the lower half of a register
    ("cvt.u32.u64", "u32", ("u64",), lambda a: a.astype("u4")),
    ("cvt.u64.u32", "u64", ("u32",), lambda a: a.astype("u8")),
    ("cvt.sat.f32.f32", "f32", ("f32",), lambda a: np.where(a > 0, np.minimum(a, 1), 0)),
    ("cvt.rni.f64.f64", "f64", ("f64",), np.rint),
    ("bfe.u32", "u32", ("u32", "u32", "u32"), lambda a, b, c: _field(a, b, c)),
]


def _field(a: Array, begin: Array, count: Array) -> Array:
    begin, count = (x.astype("u8") & np.uint64(255) for x in (begin, count))
    below = np.where(begin > 31, np.uint64(0), a.astype("u8") >> np.minimum(begin, np.uint64(31)))
    mask = np.where(
        count >= 32, np.uint64(2**32 - 1), (np.uint64(1) << np.minimum(count, np.uint64(31))) - np.uint64(1)
    )
    return (below & mask).astype("u4")


@pytest.mark.parametrize(("opcode", "result", "operands", "expected"), CASES, ids=[f"{c[0]} {c[2]}" for c in CASES])
@np.errstate(all="ignore")
def test_opcode(opcode: str, result: str, operands: tuple[str, ...], expected: Callable[..., Array]) -> None:
    given = [numbers(kind, k) for k, kind in enumerate(operands)]
    into = np.zeros(LANES, f"{result[0]}{int(result[1:]) // 8}".replace("s", "i"))

    def tensor(a: Array) -> torch.Tensor:
        return torch.from_numpy(a.view(a.dtype.str.replace("u", "i")))

    elementwise(opcode, [tensor(a) for a in given], tensor(into))
    np.testing.assert_array_equal(into, expected(*given).astype(into.dtype))


def test_fused_multiply_add_rounds_once() -> None:
    a = torch.full((LANES,), 1 + 2**-12, dtype=torch.float32)
    c = -(a * a)
    found = elementwise("fma.rn.f32", [a, a, c], torch.zeros(LANES))
    assert found.tolist() == [2.0**-24] * LANES


@pytest.mark.parametrize(("name", "function"), [("rcp", torch.reciprocal), ("ex2", torch.exp2), ("lg2", torch.log2)])
def test_approximations_are_off_by_what_the_hardware_allows(name: str, function: Any) -> None:
    x = torch.rand(LANES) * 30 + 2
    found = elementwise(f"{name}.approx.ftz.f32", [x], torch.zeros(LANES)).double()
    error = (found / function(x.double()) - 1).abs().max().item()
    assert 2**-26 < error <= 2**-22 + 2**-24


TO_SHARED = """
mov.u32 %r1, memory;
mad.lo.s32 %r2, %r0, 4, %r1;
st.shared.u32 [%r2], %r0;
"""
FROM_NEIGHBOUR = """
xor.b32 %r3, %r0, LANE;
mad.lo.s32 %r4, %r3, 4, %r1;
ld.shared.u32 %r5, [%r4];
"""
STORED = "mad.wide.u32 %rd8, %r0, 4, %rd0;\nst.global.u32 [%rd8], %r5;"


@pytest.mark.parametrize(
    ("between", "lane", "finding"),
    [
        ("bar.sync 0;", 64, ""),
        ("bar.warp.sync -1;", 1, ""),
        ("", 64, "race in shared memory: "),
        ("", 1, "race in shared memory: read after write"),
        ("bar.warp.sync -1;", 64, "race in shared memory: "),
    ],
)
def test_barriers(between: str, lane: int, finding: str) -> None:
    text = kernel(TO_SHARED + between + FROM_NEIGHBOUR.replace("LANE", str(lane)) + STORED, shared_bytes=512)
    out = torch.zeros(128, dtype=torch.int32)
    for order in ptx.ORDERS:
        with ptx.machine().set(order):
            found = run(text, outputs=[out], threads=128)
        if finding:
            assert any(line.startswith(("read of shared", finding)) for line in found), order
        else:
            assert not found
            assert out.tolist() == [k ^ lane for k in range(128)]


FOUND = {
    "read of shared memory that was never written": (
        "mov.u32 %r1, memory;\nld.shared.u32 %r5, [%r1+4];\n" + STORED,
        "snippet, PTX line",
    ),
    "write after write": ("st.global.u32 [%rd0], %r0;", "race in global memory: write after write"),
    "write to an input": ("ld.global.u32 %r1, [%rd1];\nst.global.u32 [%rd1], %r1;\n", "write to an input"),
    "read of an output": ("ld.global.u32 %r5, [%rd0];\n", "read of global memory that was never written"),
    "a shuffle from a lane outside": (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra $L1;\nshfl.sync.bfly.b32 %r5, %r0, 16, 31, -65536;\n$L1:\n",
        "shuffle from a lane outside the mask",
    ),
    "a barrier on different ways": (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra $L1;\nbar.sync 0;\nbra $L2;\n$L1:\nbar.sync 0;\n$L2:\n",
        "threads of a warp at a barrier on different ways",
    ),
    "a barrier after threads have left": (
        "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:\n",
        "barrier after threads have left",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_findings(name: str) -> None:
    body, finding = FOUND[name]
    uses_input = "%rd1]" in body
    inputs = [torch.zeros(LANES, dtype=torch.int32)] if uses_input else []
    outputs = [torch.zeros(LANES, dtype=torch.int32)] if "%rd0" in body else []
    if uses_input:
        body, outputs = body.replace("%rd1]", "%rd0]"), []
    found = run(kernel(body, shared_bytes=64), inputs, outputs)
    assert any(finding in line for line in found), found


def test_races_between_blocks() -> None:
    out = torch.zeros(LANES, dtype=torch.int32)
    own = "mov.u32 %r1, %ctaid.x;\nmad.wide.u32 %rd8, %r1, 4, %rd0;\n"
    assert not run(kernel(f"{own}st.global.u32 [%rd8], %r1;\n"), outputs=[out], blocks=3)
    found = run(kernel("mov.u32 %r1, %ctaid.x;\nst.global.u32 [%rd0], %r1;\n"), outputs=[out], blocks=3)
    assert any("race in global memory: write after write" in line for line in found)
    found = run(kernel(f"{own}st.global.u32 [%rd8], %r1;\nld.global.u32 %r5, [%rd0];\n"), outputs=[out], blocks=3)
    assert any("race in global memory: read after write" in line for line in found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.v2.f32 {%f1, %f2}, [%rd0+4];", "misaligned access of 8 bytes"),
        ("ld.global.f32 %f1, [%rd0+128];", "read out of the bounds of global memory .* 4 bytes after"),
        ("st.global.f32 [%rd0+-4], 0f00000000;", "write out of the bounds of global memory"),
        ("mov.u32 %r1, memory;\nld.shared.u32 %r2, [%r1+64];", "read out of the bounds of shared memory, at 64 of 64"),
        ("setp.lt.u32 %p1, %r0, 9;\n@%p1 ret;\nbar.warp.sync -1;", "waits for a thread that has left"),
        (
            "setp.lt.u32 %p1, %r0, 9;\n@%p1 bra $L1;\nbar.warp.sync -1;\n$L1:\nbar.sync 0;",
            "threads wait for each other",
        ),
        ("bar.warp.sync 65535;", "a thread is not in the mask of its own warp operation"),
        ("trap;", "trap"),
        ("mov.u32 %r1, 0;\ndiv.u32 %r2, %r0, %r1;", "division by zero"),
    ],
)
def test_what_cannot_go_on(body: str, message: str) -> None:
    t = torch.zeros(LANES)
    with pytest.raises(ptx.Finding, match=message):
        run(kernel(body, shared_bytes=64), [t] if "%rd0" in body else [])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sin.approx.f32 %f1, %f2;", "a register that nothing writes"),
        ("add.s32 %r1, %r2, 1;", "a register that nothing writes"),
        ("cvt.rz.f32.f64 %f1, 0d0000000000000000;", "unknown .'rz'"),
        (".local .align 4 .b8 depot[8];", "local"),
    ],
)
def test_what_is_not_translated(body: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ptx_code.kernels_of(kernel(body))


def test_an_unknown_opcode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no opcode sin\.approx\.f32"):
        run(kernel("mov.f32 %f2, 0f00000000;\nsin.approx.f32 %f1, %f2;"))


def test_parameters_have_the_sizes_of_the_kernel() -> None:
    (found,) = ptx_code.kernels_of(kernel("ld.global.f32 %f1, [%rd0];"))
    ptx.machine().add(found, "snippet")
    with pytest.raises(ptx.Finding, match="parameter 0 has 4 bytes, in PTX 8"):
        ptx.machine().launch("snippet", 1, 32, 0, [ptx._INT(1)])


@pytest.mark.parametrize(("stride", "cycles"), [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, cycles: int) -> None:
    body = f"mov.u32 %r1, memory;\nmul.lo.s32 %r2, %r0, {4 * stride};\nadd.s32 %r3, %r2, %r1;\nst.shared.u32 [%r3], 7;"
    assert not run(kernel(body, shared_bytes=4 * (31 * stride + 1)))
    stores = [line for line in ptx.machine().counts("snippet") if line.ideal_cycles]
    assert [(line.cycles, line.ideal_cycles) for line in stores] == [(cycles, 1)]


def test_products_and_sums_can_be_contracted() -> None:
    text = kernel("mul.f32 %f3, %f1, %f2;\nadd.f32 %f4, %f3, %f1;\nst.global.f32 [%rd0], %f4;").replace(
        "mul.f32", "mov.f32 %f1, 0f3F800800;\nmov.f32 %f2, 0f3F800800;\nmul.f32"
    )
    plain, contracted = ([row.name for row in ptx_code.kernels_of(text, contract=c)[0].rows] for c in (False, True))
    assert "mul.f32" in plain
    assert "fma.f32" in contracted
    assert "mul.f32" not in contracted
