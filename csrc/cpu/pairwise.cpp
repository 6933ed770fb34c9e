#include <cmath>

#include "cpu/sweep/gradient_sweep.h"
#include "cpu/sweep/scale.h"

namespace csdiv::cpu {

template <class T>
void pairwise_forward(const Problem<T>& batched, T* values, int threads) {
  const Problem<T> problem = flattened(batched);
  threads = useful_threads(problem, threads);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const PackedColumns<T> columns(problem, LogWeights::kZero, threads);
  const int64_t m = problem.q.n, tiles = num_row_tiles(problem), rows_of_problem = batched.p.n;
  const AlignedArray<double> left_out(batched.batch);
  offsets(batched, Uniform::kNone, left_out.get());
  parallel_for(problem.batch * tiles, threads, [&](int64_t task) {
    const int64_t b = task / tiles, first = task % tiles * kTileRows;
    const RowTile<T> rows = row_tile(problem, b, task % tiles);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    for (int64_t s = 0; s < columns.stripes(); ++s) {
      const Stripe<T>& stripe = columns.stripe(problem.q.item(b), s);
      interruption_point();
      kernels.logits(rows, stripe, 0, logits);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t row = b * problem.p.n + first + r;
        const double offset = left_out.get()[row / rows_of_problem];
        T* const to = values + row * m + s * columns.width();
        for (int64_t j = 0; j < stripe.count; ++j) to[j] = T(logits[r * stripe.stride + j] + offset);
      }
    }
  });
}

template <class T>
void pairwise_backward(const Problem<T>& batched, const T* grad_values, const SideGradients<T>& grad_p,
                       const SideGradients<T>& grad_q, int threads) {
  const Problem<T> problem = flattened(batched);
  const int64_t m = problem.q.n;
  const TileKernels<T>& kernels = tile_kernels<T>();
  // The weights are the gradients themselves. Where the logit is infinite (components too far apart, or points at one
  // place) they are zero, where it is NaN so are they; a certified tile has neither.
  const auto fill = [&](const SweepTile<T>& tile, T* weights) {
    const bool plain = kernels.certified(tile.rows.range, tile.columns.range);
    if (!plain) kernels.logits(tile.rows, tile.columns, 0, weights);
    uint32_t active = 0;
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      T* const row = weights + r * tile.columns.stride;
      const T* const from = grad_values + (tile.problem * problem.p.n + tile.first_row + r) * m + tile.first_column;
      for (int64_t j = 0; j < tile.columns.padded; ++j) {
        const bool counts = j < tile.columns.count && from[j] != 0 && (plain || !std::isinf(row[j]));
        row[j] = !counts ? T(0) : plain || row[j] == row[j] ? from[j] : row[j];
        if (row[j] != 0) active |= uint32_t(1) << r;
      }
    }
    return active;
  };
  sweep_gradients(problem, LogWeights::kZero, grad_p, grad_q, threads, fill);
}

CSDIV_INSTANTIATE(pairwise_forward);
CSDIV_INSTANTIATE(pairwise_backward);

}   // namespace csdiv::cpu
