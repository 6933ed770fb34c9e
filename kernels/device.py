"""What the kernels need of the platform: approximate instructions, limits of the fast form, sizes of tiles."""

import triton
import triton.language as tl

TILE = tl.constexpr(128)  # components of a packed tile, and threads of a program: one column each
GROUP = tl.constexpr(4)  # dimensions that share one reciprocal and one logarithm
FLAG_DIMS = tl.constexpr(32)  # dimensions that share a flag
LOG2_E, LOG_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
LOG_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def approximate_reciprocal(x):
    """1/x of normal numbers: relative error 1 ulp."""
    if INTERPRETED:
        return 1.0 / x
    elif x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:  # 20 bits, doubled twice
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], tl.float64, True, 1)
        y = tl.fma(tl.fma(-x, y, 1.0), y, y)
        return tl.fma(tl.fma(-x, y, 1.0), y, y)


@triton.jit
def reciprocal(x):
    """1/x of normal numbers, rounded but once: what all pairs share does not average out."""
    if INTERPRETED or x.dtype == tl.float64:
        return approximate_reciprocal(x)
    else:
        y = approximate_reciprocal(x)
        return tl.fma(tl.fma(-x, y, 1.0), y, y)


@triton.jit
def approximate_log2(x):
    """log2 x of normal numbers: error 2^-22, absolute between 1/2 and 2, else relative."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def approximate_exp2(x):
    """2^x: relative error 2^-22; 0 below the normal numbers, and NaN of NaN."""
    if INTERPRETED or x.dtype == tl.float64:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


INTERPRETED = tl.constexpr(not isinstance(approximate_exp2, triton.JITFunction))  # which knows no machine code


@triton.jit
def fma(x, y: tl.constexpr, z):
    """x y + z with one rounding."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(z.dtype)
    else:
        return tl.fma(x, tl.full(x.shape, y, x.dtype), z)


@triton.jit
def rounded_product(x, y):
    """x y, which is not contracted with a sum: threads that share one would add unlike numbers, and differ."""
    if INTERPRETED or x.dtype == tl.float64:
        return x * y
    else:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, True, 1)


@triton.jit
def item_of(index, problem):
    """The item of a side that a problem uses: its own where there is no index."""
    if index is None:
        return problem
    else:
        return tl.load(index + problem)


@triton.jit
def padded_dim(dim):
    return (dim + GROUP - 1) // GROUP * GROUP


@triton.jit
def tiles_of(n):
    return (n + TILE - 1) // TILE


@triton.jit
def place(tiles, parts):
    """Problem, tile and part of this program; parts come first, then tiles."""
    program = tl.program_id(0)
    return (program // parts // tiles).to(tl.int64), program // parts % tiles, program % parts


@triton.jit
def part_begin(size, parts, k):
    """Where the k-th of ``parts`` parts of 0..size begins, as equal as can be."""
    return (size.to(tl.int64) * k // parts).to(tl.int32)
