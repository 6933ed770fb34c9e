"""Gradients of sums over pairs, of one side at a time: its components are the columns, the other side's the rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from csdiv.kernels.configurations import SWEEP_PROGRAMS, cut
from csdiv.kernels.device import (
    FLAG_DIMS,
    GROUP,
    TILE,
    approximate_exp2,
    approximate_reciprocal,
    item_of,
    padded_dim,
    part_begin,
    place,
    reciprocal,
    tiles_of,
)
from csdiv.kernels.pack import Problem
from csdiv.kernels.pair import delta_and_sum, exact_delta_and_sum, exact_pair_gradient, pair_gradient
from csdiv.kernels.spherical import pair_sum
from csdiv.kernels.tile_densities import tile_densities
from csdiv.kernels.tile_logits import certified, inverse_unit, pairs_of, regular, tile_columns, tile_rows


class Weights(NamedTuple):
    """What the pair (i, j) weighs: factor_i 2^(log2_i + log2_j - total) times its density, or what is given."""

    p_log2: Tensor | None = None  # (items, padded n) with totals, else (batch, padded n); -inf: counts nothing
    totals: Tensor | None = None  # (batch,) float64 contiguous; None: 0
    p_factors: Tensor | None = None  # (batch, padded n); None: 1
    given: Tensor | None = None  # (batch, n, m); pairs too far apart, and of points at one place, count nothing


@triton.jit
def shares(densities, p_log2, q_log2, totals, factors, p_at, q_at, problem):
    """Of log2 densities [BLOCK_N, TILE], to which p_at and q_at broadcast. Rounded first as in the sums of rows."""
    p_term, q_term = tl.load(p_log2 + p_at), tl.load(q_log2 + q_at)
    if totals is not None:
        share = (p_term.to(tl.float64) - tl.load(totals + problem)).to(p_term.dtype)
        p_term = tl.where(p_term == -float("inf"), p_term, share)
    weights = approximate_exp2(densities + q_term + p_term)
    if factors is not None:
        weights *= tl.load(factors + p_at)
    infinity = float("inf")
    return tl.where((densities == -infinity) | (p_term == -infinity) | (q_term == -infinity), 0.0, weights)


@triton.jit
def accumulate(sums, value):
    tl.store(sums, tl.load(sums) + value)


@triton.jit
def sweep_dimensions(
    weights, row, row_flags, column, column_flags, scales, dim, mean_sums, variance_sums, stride
):  # fmt: skip
    """Adds sum_i w u and sum_i w (u^2 - 1/c) of a tile to the sums of its columns, ``stride`` apart by dimensions."""
    padded = padded_dim(dim)
    rows, columns = pairs_of(row, column, weights.shape[0])
    for begin in range(0, dim, FLAG_DIMS):
        row_flag, column_flag = tl.load(row_flags + begin // FLAG_DIMS), tl.load(column_flags + begin // FLAG_DIMS)
        first, last = begin // GROUP, tl.minimum(begin + FLAG_DIMS, padded) // GROUP
        if certified(row_flag, column_flag):
            for group in range(first, last):
                at = group * (2 * GROUP * TILE)
                for k in tl.static_range(GROUP):
                    d = group * GROUP + k
                    delta, c = delta_and_sum(rows + at, columns + at, k)
                    u, v = pair_gradient(delta, c)
                    unit = tl.load(scales + padded + d).to(tl.float64)  # from the scaled dimension to the caller's
                    accumulate(mean_sums + d * stride, tl.sum(weights * u, 0).to(tl.float64) * unit)
                    accumulate(variance_sums + d * stride, tl.sum(weights * v, 0).to(tl.float64) * unit * unit)
        else:
            for group in range(first, last):
                for k in range(GROUP):
                    d, at = group * GROUP + k, group * (2 * GROUP * TILE) + k * TILE
                    unit = tl.load(scales + padded + d)
                    row_unit, column_unit = inverse_unit(row_flag, unit), inverse_unit(column_flag, unit)
                    delta, c = exact_delta_and_sum(rows + at, columns + at, row_unit, column_unit)
                    u, v = exact_pair_gradient(weights, delta, c)
                    accumulate(mean_sums + d * stride, tl.sum(u, 0).to(tl.float64))
                    accumulate(variance_sums + d * stride, tl.sum(v, 0).to(tl.float64))


@triton.jit
def sweep_spherical(weights, quadratic, row, column, scales, dim, mean_sums, variance_sums, stride):
    """The same of a regular tile of spherical components; sum_d (u^2 - 1/c) goes to the first dimension."""
    padded = padded_dim(dim)
    rows, columns = pairs_of(row, column, weights.shape[0])
    unit = tl.load(scales + padded).to(tl.float64)
    ratios = weights * approximate_reciprocal(pair_sum(rows, columns))
    accumulate(variance_sums, tl.sum(ratios * (quadratic - dim), 0).to(tl.float64) * unit * unit)
    for group in range(padded // GROUP):
        for k in tl.static_range(GROUP):
            at = group * (2 * GROUP * TILE) + k * TILE
            delta = tl.load(rows + at)[:, None] - tl.load(columns + at)[None, :]
            accumulate(mean_sums, tl.sum(ratios * delta, 0).to(tl.float64) * unit)
            mean_sums += stride


@triton.jit
def sweep_tied(weights, row, column, scales, dim, mean_sums, variance_sums, stride):
    """The same of a regular tile whose rows have tied variances: c is taken out of the sums over them."""
    padded, total = padded_dim(dim), tl.sum(weights, 0)
    rows, columns = pairs_of(row, column, weights.shape[0])
    for group in range(padded // GROUP):
        for k in tl.static_range(GROUP):
            d, at = group * GROUP + k, group * (2 * GROUP * TILE) + k * TILE
            delta = tl.load(rows + at)[:, None] - tl.load(columns + at)[None, :]
            w = reciprocal(tl.load(row + (at + GROUP * TILE)) + tl.load(columns + (at + GROUP * TILE)))
            unit = tl.load(scales + padded + d).to(tl.float64)
            weighted = weights * delta
            mean, variance = w * tl.sum(weighted, 0), w * (w * tl.sum(weighted * delta, 0) - total)
            accumulate(mean_sums, mean.to(tl.float64) * unit)
            accumulate(variance_sums, variance.to(tl.float64) * unit * unit)
            mean_sums += stride
            variance_sums += stride


@triton.jit(do_not_specialize=["n", "m", "dim", "scale_stride", "parts"], do_not_specialize_on_alignment=["given"])
def gradient_sweep_kernel(
    row_values, row_flags, column_values, column_flags, scales, row_index, column_index,
    p_log2, q_log2, totals, factors, given, sums, n, m, dim, scale_stride, parts,
    COLUMNS_OF_P: tl.constexpr, DIMENSIONS: tl.constexpr, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sums[b, part] = (2 padded dim + 1, padded m): of means, variances and weights of the columns, over a part of
    the rows; zero before. DIMENSIONS: whether any but those of the weights are wanted."""
    problem, column_tile, part = place(tiles_of(m), parts)
    row_item, column_item = item_of(row_index, problem), item_of(column_index, problem)

    p_item = problem if totals is None else (column_item if COLUMNS_OF_P else row_item)
    row_tiles, padded = (n + BLOCK_N - 1) // BLOCK_N, padded_dim(dim)
    rows_padded, stride = tiles_of(n).to(tl.int64) * TILE, tiles_of(m).to(tl.int64) * TILE
    j = tl.arange(0, TILE) + column_tile * TILE
    column, flags_of_columns = tile_columns(column_values, column_flags, column_item, m, column_tile, dim)
    scales += problem * scale_stride
    sums += (problem * parts + part) * (2 * padded + 1) * stride + j
    weight_sum = tl.zeros([TILE], tl.float64)
    for row_tile in range(part_begin(row_tiles, parts, part), part_begin(row_tiles, parts, part + 1)):
        first_row = row_tile * BLOCK_N
        i = tl.arange(0, BLOCK_N) + first_row
        row, flags_of_rows = tile_rows(row_values, row_flags, row_item, n, first_row, dim, BLOCK_N)
        tile = (row, flags_of_rows, column, flags_of_columns)
        densities, quadratic = tile_densities(*tile, scales, dim, FORM, BLOCK_N)
        if given is not None:
            at = (problem * n + i)[:, None] * m + j[None, :]
            counts = (i < n)[:, None] & (j < m)[None, :] & (tl.abs(densities) != float("inf"))
            weights = tl.load(given + at, mask=counts, other=0.0)
        elif COLUMNS_OF_P:
            p_at, q_at = (p_item * stride + j)[None, :], (row_item * rows_padded + i)[:, None]
            weights = shares(densities, p_log2, q_log2, totals, factors, p_at, q_at, problem)
        else:
            p_at, q_at = (p_item * rows_padded + i)[:, None], (column_item * stride + j)[None, :]
            weights = shares(densities, p_log2, q_log2, totals, factors, p_at, q_at, problem)
        if tl.max((weights != 0).to(tl.int32)) > 0:
            weight_sum += tl.sum(weights, 0).to(tl.float64)
            if DIMENSIONS:
                variance_sums = sums + padded * stride
                if FORM == "diagonal":
                    sweep_dimensions(weights, *tile, scales, dim, sums, variance_sums, stride)
                elif regular(flags_of_rows, flags_of_columns, dim):
                    if FORM == "spherical" or FORM == "spherical matrix":
                        sweep_spherical(weights, quadratic, row, column, scales, dim, sums, variance_sums, stride)
                    else:
                        sweep_tied(weights, row, column, scales, dim, sums, variance_sums, stride)
                else:
                    sweep_dimensions(weights, *tile, scales, dim, sums, variance_sums, stride)
                tl.debug_barrier()  # before the next tile reads the sums
    tl.store(sums + 2 * padded * stride, weight_sum)


def launch_gradient_sweep(
    problem: Problem, weights: Weights, processors: int, *, of_p: bool, dimensions: bool = True
) -> Tensor:
    """Sums over the pairs of each problem for every component of p, or of q: (batch, 2 padded dim + 1, padded).

    Before factors: of means sum w (other mean - own) / c, of variances twice theirs, and of weights.
    """
    rows, columns = (problem.q, problem.p) if of_p else (problem.p, problem.q)
    row_index, column_index = (problem.q_index, problem.p_index) if of_p else (problem.p_index, problem.q_index)
    q_log2 = None if weights.p_log2 is None else problem.q.log2_weights
    given = weights.given.mT.contiguous() if of_p and weights.given is not None else weights.given
    form = problem.form(rows_of_q=of_p)
    tile = problem.tile("sweep", form)
    column_tiles = problem.batch * (columns.padded // 128)
    parts = cut(processors * SWEEP_PROGRAMS, column_tiles, -(-rows.n // tile.block_n))
    padded = -(-problem.dim // 4) * 4
    shape = (problem.batch, parts, 2 * padded + 1, columns.padded)
    sums = columns.values.new_zeros(shape, dtype=torch.float64)
    if column_tiles:
        sides = (rows.values, rows.flags, columns.values, columns.flags, problem.scale.scales, row_index, column_index)
        arguments = (*sides, weights.p_log2, q_log2, weights.totals, weights.p_factors, given, sums)
        sizes = (rows.n, columns.n, problem.dim, problem.scale.stride, parts)
        flags = {"COLUMNS_OF_P": of_p, "DIMENSIONS": dimensions, "FORM": form, "BLOCK_N": tile.block_n}
        gradient_sweep_kernel[(column_tiles * parts,)](*arguments, *sizes, **flags, **tile.options)
    return sums.sum(1) if parts > 1 else sums.squeeze(1)
