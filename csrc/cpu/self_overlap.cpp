#include <algorithm>
#include <cmath>
#include <limits>

#include "gradient_sweep.h"
#include "log_sum_exp.h"

namespace csdiv::cpu {
namespace {

template <class T>
Problem<T> with_itself(int64_t dim, const Mixture<T>& p) {
  Problem<T> problem{p.batch, dim, p, p};
  problem.p.index = problem.q.index = nullptr;   // of the pair that p may come from
  problem.p.log_weights = nullptr;               // the drivers below add them
  return problem;
}

}   // namespace

template <class T>
void self_overlap_forward(int64_t dim, const Mixture<T>& p, double* values, int threads) {
  const Problem<T> problem = with_itself(dim, p);
  threads = useful_threads(problem, threads);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const PackedColumns<T> columns(problem, LogWeights::kKept, kStripeColumns, threads);
  const int64_t tiles = num_row_tiles(problem), lanes = kernels.lanes;
  AlignedArray<LogSumExp> partial(p.batch * tiles);

  // Row i against columns j >= i. Pairs j > i count twice; those of a tile before its diagonal are taken out.
  parallel_for(p.batch * tiles, threads, [&](int64_t task) {
    const int64_t b = task / tiles, first = task % tiles * kTileRows;
    const RowTile<T> rows = row_tile(problem, b, task % tiles);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    LogSumExp total;
    for (int64_t s = first / kStripeColumns; s < columns.stripes(); ++s) {
      const Stripe<T>& stripe = columns.stripe(b, s);
      const int64_t origin = s * kStripeColumns;
      const int64_t first_column = first > origin ? (first - origin) / lanes * lanes : 0;
      kernels.logits(rows, stripe, first_column, logits);
      for (int64_t r = 0; r < rows.count; ++r) {
        const double log_weight = p.log_weight(b, first + r);
        if (log_weight == -INFINITY) continue;
        T* const row = logits + r * stripe.stride;
        const int64_t diagonal = first + r - origin;   // column of the pair (i, i); outside of the stripe for most
        if (diagonal >= stripe.count) continue;
        if (diagonal >= 0) {
          total.add_one(log_weight + row[diagonal]);
          std::fill(row + first_column, row + diagonal + 1, T(-INFINITY));
        }
        const PartialSum<T> sum = kernels.partial_sum(row + first_column, stripe.padded - first_column);
        total.add_scaled(sum.max, 2 * sum.sum, log_weight);
      }
    }
    partial.get()[task] = total;
  });

  for (int64_t b = 0; b < p.batch; ++b) {
    LogSumExp total;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const LogSumExp& part = partial.get()[b * tiles + tile];
      total.add(part.max, part.sum);
    }
    values[b] = total.value();
  }
}

template <class T>
void self_overlap_backward(int64_t dim, const Mixture<T>& p, const double* values, const T* grad_values,
                           const SideGradients<T>& grad, int threads) {
  const Problem<T> problem = with_itself(dim, p);
  const TileKernels<T>& kernels = tile_kernels<T>();
  // Equation (6): twice the one-sided gradients, with r_ij = exp(log a_i + logit_ij - log V). A pair j > i counts for
  // both of its components at once; the pair (i, i), swept as a row and as a column, counts half for each.
  const auto fill = [&](const SweepTile<T>& tile, T* weights) {
    T log_normalizers[kTileRows], grads[kTileRows];
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      const T log_weight = p.log_weight(tile.problem, tile.first_row + r);
      log_normalizers[r] = T(values[tile.problem] - double(log_weight));
      grads[r] = log_weight == -INFINITY || values[tile.problem] == -INFINITY ? T(0) : 2 * grad_values[tile.problem];
    }
    kernels.logits(tile.rows, tile.columns, 0, weights);
    T diagonal[kTileRows] = {};
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      const int64_t j = tile.diagonal(r);
      if (j < 0) continue;
      T* const row = weights + r * tile.columns.stride;
      if (j < tile.columns.count && grads[r] != 0) {
        const T logit = row[j] - log_normalizers[r];
        diagonal[r] = T(0.5) * grads[r] * std::exp(logit > 0 ? T(0) : logit);
      }
      std::fill_n(row, std::min(j + 1, tile.columns.padded), -std::numeric_limits<T>::infinity());
    }
    uint32_t active =
        kernels.weights(tile.rows, tile.columns, {log_normalizers, grads}, weights, tile.column_sums, tile.row_sums);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      if (diagonal[r] == 0) continue;
      const int64_t j = tile.diagonal(r);
      weights[r * tile.columns.stride + j] = diagonal[r];
      tile.column_sums[j] += diagonal[r];
      tile.row_sums[r] += diagonal[r];
      active |= uint32_t(1) << r;
    }
    return active;
  };
  sweep_self_gradients(problem, LogWeights::kKept, grad, threads, fill);
}

template void self_overlap_forward(int64_t, const Mixture<float>&, double*, int);
template void self_overlap_forward(int64_t, const Mixture<double>&, double*, int);
template void self_overlap_backward(int64_t, const Mixture<float>&, const double*, const float*,
                                    const SideGradients<float>&, int);
template void self_overlap_backward(int64_t, const Mixture<double>&, const double*, const double*,
                                    const SideGradients<double>&, int);

}   // namespace csdiv::cpu
