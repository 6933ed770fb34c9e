// What the pairs of a tile weigh in the gradients: their shares of a sum, or what is given.
#pragma once

#include "gradient_sweep.h"

namespace csdiv::cuda {

// What makes a logit of a row its share: 2^(logit + shift), times the factor. A factor of zero: the row counts nothing.
template <class T>
struct RowShare {
  T shift, factor;
};

// As a thread has them of a tile: in registers first.
template <class T>
using TileWeights = Logits<T>;

// The reference of a problem's logits: log2 of their total, or what they leave out, in nats.
template <class T>
CSDIV_DEVICE double reference_of(const GradientTask<T>& task, int problem) {
  if (task.weights == Weights::kGiven) return 0;
  const bool of_total = task.weights == Weights::kOfTotal;
  const double offset = log_offset(task.problem, problem, of_total);
  return of_total ? (task.value(problem) - offset) * kLog2E : offset;
}

// A thread for each row of the tile. Shares are zero where the sum is infinite.
template <class T>
CSDIV_DEVICE void share_rows(const GradientTask<T>& task, const TileIndex& tile, double reference, RowShare<T>* rows) {
  if (threadIdx.x >= kTile) return;
  const Mixture<T>& p = task.problem.p;
  const int64_t i = tile.first_row() + threadIdx.x, row = tile.problem * p.n + i;
  T shift = 0, factor;
  if (task.weights == Weights::kOfTotal) {
    const T log_weight = p.log2_weights[tile.p_item * p.tiles() * kTile + i], total = T(reference);
    shift = log_weight - total;
    factor = counts(log_weight) && !isinf(total);
  } else {
    factor = i < p.n && !isinf(task.row_lse[row]) ? task.given[row] : T(0);
    if (factor != 0) shift = T((reference - task.row_lse[row]) * kLog2E);
  }
  rows[threadIdx.x] = {shift, factor};
}

// From logits to the pairs' shares, times the gradient of the row where there is one.
template <class T>
CSDIV_DEVICE void shares(const GradientTask<T>& task, const TileIndex& tile, const RowShare<T>* rows,
                         TileWeights<T>& weights) {
  const int row = threadIdx.x / kColumnThreads * kThreadRows;
  const int64_t first_column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
    const auto [shift, factor] = rows[row + a];
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c) {
      T& weight = weights[a][c];
      const T logit = task.self ? upper_triangle(weight, tile.first_row() + row + a, first_column + c) : weight;
      weight = factor == 0 || logit == -T(INFINITY) ? T(0) : factor * approximate_exp2(logit + shift);
    }
  }
}

// How many of the kTile components from `first` on exist; not positive: none.
CSDIV_DEVICE int existing(int64_t n, int64_t first) {
  return int(n - first < kTile ? n - first : kTile);
}

// Whether weights are given and no logit of the tile can be infinite, so that none is needed.
template <class T>
CSDIV_DEVICE bool needs_no_logits(const GradientTask<T>& task, const TileIndex& tile) {
  bool result = task.weights == Weights::kGiven;
  for (int k = 0; result && k < flags_per_tile(task.problem.dim); ++k) result = certified(task.problem, tile, k);
  return result;
}

// The gradients of pairs; those of components too far apart, or of points at one place, count nothing.
template <class T>
CSDIV_DEVICE void given_weights(const GradientTask<T>& task, const TileIndex& tile, TileWeights<T>& weights) {
  const Problem<T>& problem = task.problem;
  const bool plain = needs_no_logits(task, tile);
  const int64_t n = problem.p.n, m = problem.q.n;
  const int64_t first_row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
  const int64_t first_column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
  const int rows = existing(n, first_row), columns = existing(m, first_column);
  const T* given = task.given + (tile.problem * n + first_row) * m + first_column;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a, given += m) {
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c) {
      T& weight = weights[a][c];
      weight = a < rows && c < columns && (plain || !isinf(weight)) ? given[c] : T(0);
    }
  }
}

}   // namespace csdiv::cuda
