"""Mixtures as the kernels read them: scaled by powers of two, in tiles, with flags for where the fast form holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import OPTIONS, PACK_OPTIONS, Shared, Tile, form_of, structure_of, tile_of
from csdiv.kernels.device import FLAG_DIMS, GROUP, LOG2_E, LOG_2, LOG_2_PI, TILE, padded_dim, tiles_of

SAMPLES = tl.constexpr(8)  # of each side, for the scale of a dimension


class Packed(NamedTuple):
    """One side: ``items`` mixtures of n components, tiles of 128."""

    values: Tensor  # (items, tiles, padded dim / 4, 2, 4, 128) means and variances
    log2_weights: Tensor  # (items, tiles * 128); -inf where there is no component
    flags: Tensor  # (items, tiles, dim / 32) int32: 0 irregular and not scaled, 1 regular, 3 and no variance is small
    n: int
    shared: Shared

    @property
    def items(self) -> int:
        return len(self.values)

    @property
    def padded(self) -> int:
        return self.log2_weights.shape[1]


class Scale(NamedTuple):
    """Means times 2^k and variances times 4^k bring c = s + t near 2^center in every dimension.

    Logarithms of c are taken relative to center - 2k, the reference, which is exact.
    """

    scales: Tensor  # (items, 3, padded dim) references, units 2^k, and centers summed over groups
    offsets: Tensor  # (items,) float64: what logits leave out, references and constants of the density, in nats

    @property
    def stride(self) -> int:
        """From one problem to the next; 0: all share one scale."""
        return self.scales[0].numel() if len(self.scales) > 1 else 0

    @property
    def offset_stride(self) -> int:
        return int(len(self.offsets) > 1)


class Problem(NamedTuple):
    """p against q, ``batch`` times."""

    p: Packed
    q: Packed
    p_index: Tensor | None  # (batch,) int64: the item that each problem uses; None: its own
    q_index: Tensor | None
    scale: Scale
    batch: int
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.p.values.dtype

    def form(self, *, rows_of_q: bool = False, exact: bool = False) -> str:
        """How kernels compute the pair term, see configurations.py; the rows of tiles are those of p, or of q."""
        rows, columns = (self.q, self.p) if rows_of_q else (self.p, self.q)
        return form_of(structure_of(rows.shared, columns.shared), self.dtype, self.dim, exact=exact)

    def tile(self, kernel: str, form: str) -> Tile:
        """How "rows" or "sweep" is launched in this form."""
        return tile_of(kernel, form, self.dtype)

    def with_itself(self, side: Packed) -> Problem:
        """A side with itself, one problem for each of its items, on the scale of the pair."""
        return Problem(side, side, None, None, self.scale, side.items, self.dim)


@triton.jit
def power_of_two(k, dtype: tl.constexpr):
    if dtype == tl.float32:
        return ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def mean_log2_variance(variances, count, dim, d, mask):
    """Over some components; infinite or NaN where one of them has no logarithm, or there is none."""
    total = tl.zeros(d.shape, variances.dtype.element_ty)
    for k in tl.static_range(SAMPLES):
        sample = count.to(tl.int64) * k // SAMPLES
        total += tl.log2(tl.load(variances + sample * dim + d, mask=mask & (count > 0), other=1.0))
    return tl.where(count > 0, total / SAMPLES, float("nan"))


@triton.jit
def log2_center(p_mean, q_mean):
    """log2 of what c = s + t is like."""
    p_finite, q_finite = p_mean - p_mean == 0, q_mean - q_mean == 0
    mean = tl.where(p_finite, tl.where(q_finite, (p_mean + q_mean) * 0.5, p_mean), q_mean)
    return tl.where(p_finite | q_finite, 1 + mean, 0.0)


# Tensors that a user gave may begin anywhere: a kernel for aligned ones would be compiled twice.
@triton.jit(
    do_not_specialize=["p_count", "q_count", "dim"], do_not_specialize_on_alignment=["p_variances", "q_variances"]
)
def scale_kernel(p_variances, q_variances, scales, offsets, p_count, q_count, dim, BLOCK_D: tl.constexpr):
    """One program for each scale; ``count`` components follow each other for it."""
    item, padded = tl.program_id(0).to(tl.int64), padded_dim(dim)
    dtype: tl.constexpr = scales.dtype.element_ty
    most: tl.constexpr = 62 if dtype == tl.float32 else 500
    p_variances += item * p_count * dim
    q_variances += item * q_count * dim
    scales += item * 3 * padded
    total = tl.zeros([BLOCK_D], tl.float64)
    for begin in range(0, padded, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        real = d < dim
        p_mean = mean_log2_variance(p_variances, p_count, dim, d, real)
        q_mean = mean_log2_variance(q_variances, q_count, dim, d, real)
        log2_c = tl.where(real, log2_center(p_mean, q_mean), 0.0)
        k = -tl.minimum(tl.maximum(tl.floor(log2_c * 0.5 + 0.5), -most), most)
        center = tl.floor((log2_c + 2 * k) * 1024 + 0.5) * 2.0**-10  # sums of centers are exact; a quotient may err
        tl.store(scales + d, center - 2 * k, mask=d < padded)
        tl.store(scales + padded + d, power_of_two(k, dtype), mask=d < padded)
        group = begin // GROUP + tl.arange(0, BLOCK_D // GROUP)
        centers = tl.sum(tl.reshape(center, [BLOCK_D // GROUP, GROUP]), 1)
        tl.store(scales + 2 * padded + group, centers, mask=group < padded // GROUP)
        total += (center - 2 * k).to(tl.float64)
    constants = dim.to(tl.float64) * LOG_2_PI
    tl.store(offsets + item, -0.5 * (tl.sum(total, 0) * LOG_2 + constants))


@triton.jit(
    do_not_specialize=["scale_stride", "n", "dim"],
    do_not_specialize_on_alignment=["means", "variances", "log_weights"],
)
def pack_kernel(
    means, variances, log_weights, scales, values, log2_weights, flags, scale_stride, n, dim,
    TIED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for a tile. A negative variance becomes NaN, and what counts nothing is as regular as the rest."""
    dtype: tl.constexpr = values.dtype.element_ty
    smallest: tl.constexpr = 2.0**-20 if dtype == tl.float32 else 2.0**-200
    largest: tl.constexpr = 2.0**19 if dtype == tl.float32 else 2.0**199  # of half of c
    farthest: tl.constexpr = 2.0**29 if dtype == tl.float32 else 2.0**149  # of half of delta
    vanishing: tl.constexpr = 2.0**-100 if dtype == tl.float32 else 2.0**-900  # smaller ones might lose bits
    program, padded = tl.program_id(0).to(tl.int64), padded_dim(dim)
    item, tile = program // tiles_of(n), program % tiles_of(n)
    in_tile = tl.arange(0, TILE)
    component = tile * TILE + in_tile
    if log_weights is None:
        weight = tl.zeros([TILE], dtype) - tl.log2(n.to(tl.float64)).to(dtype)
    else:
        weight = tl.load(log_weights + item * n + component, mask=component < n, other=0.0) * LOG2_E
    weight = tl.where(component < n, tl.where(weight == float("inf"), float("nan"), weight), -float("inf"))
    tl.store(log2_weights + program * TILE + in_tile, weight)

    scales += item * scale_stride
    for begin in range(0, padded, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        real = (weight != -float("inf"))[:, None] & (d < dim)[None, :]
        at = (item * n + component)[:, None] * dim + d[None, :]
        mean = tl.load(means + at, mask=real, other=0.0)
        if TIED:  # what is no component has the variance of all others
            at, given = (item * n * dim + d)[None, :], (d < dim)[None, :]
        else:
            given = real
        variance = tl.load(variances + at, mask=given, other=0.5)
        variance = tl.where(variance >= 0, variance, float("nan"))
        unit = tl.load(scales + padded + d, mask=d < padded, other=1.0)[None, :]
        scaled_mean, scaled_variance = mean * unit, tl.where(given, variance * unit * unit, 0.5)
        regular = (scaled_variance <= largest) & (tl.abs(scaled_mean) <= farthest)
        regular &= (scaled_variance >= vanishing) | (variance == 0)
        all_regular = tl.min(regular.to(tl.int32)) > 0
        all_wide = tl.min((scaled_variance >= smallest).to(tl.int32)) > 0
        # What is no component is put among the others, where it does no harm to the tile's norms.
        center = tl.sum(scaled_mean, 0) / tl.maximum(tl.sum(real.to(tl.int32), 0), 1)
        scaled_mean = tl.where(real, scaled_mean, center[None, :])
        flag = tl.where(all_regular, tl.where(all_wide, 3, 1), 0)
        tl.store(flags + program * ((dim + FLAG_DIMS - 1) // FLAG_DIMS) + begin // FLAG_DIMS, flag)
        to = values + (program * padded + d // GROUP * GROUP)[None, :] * (2 * TILE)
        to += (d % GROUP)[None, :] * TILE + in_tile[:, None]
        stored = (d < padded)[None, :] & (in_tile >= 0)[:, None]
        tl.store(to, tl.where(all_regular, scaled_mean, mean), mask=stored)
        tl.store(to + GROUP * TILE, tl.where(all_regular, scaled_variance, tl.where(real, variance, 0.5)), mask=stored)


def launch_scale(p_variances: Tensor, q_variances: Tensor, items: int) -> Scale:
    """The scale of each of ``items`` problems, or of all. Variances: (p items, n, dim), (q items, m, dim)."""
    dim = p_variances.shape[-1]
    padded = -(-dim // 4) * 4
    scale = Scale(p_variances.new_empty(items, 3, padded), p_variances.new_empty(items, dtype=torch.float64))
    counts = [v.shape[:-1].numel() // max(items, 1) for v in (p_variances, q_variances)]
    if items:
        scale_kernel[(items,)](p_variances, q_variances, *scale, *counts, dim, BLOCK_D=128, **OPTIONS)
    return scale


def launch_pack(means: Tensor, variances: Tensor, log_weights: Tensor | None, scale: Scale, shared: Shared) -> Packed:
    """Means and variances (items, n, dim), log weights (items, n) or None (uniform), all contiguous."""
    items, n, dim = means.shape
    tiles, padded = -(-n // 128), -(-dim // 4) * 4
    packed = Packed(
        means.new_empty(items, tiles, padded // 4, 2, 4, 128),
        means.new_empty(items, tiles * 128),
        means.new_empty(items, tiles, -(-dim // 32), dtype=torch.int32),
        n,
        shared,
    )
    if items * tiles:
        arguments = (means, variances, log_weights, scale.scales, *packed[:3], scale.stride, n, dim)
        pack_kernel[(items * tiles,)](*arguments, TIED=shared.tied, BLOCK_D=32, **PACK_OPTIONS)
    return packed
