#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/cpu.h"
#include "cpu/sweep/gradient_sweep.h"
#include "cpu/sweep/row_sums.h"
#include "cpu/tiny.h"

namespace csdiv::cpu {
namespace {

// The gradients of the sum of all row_lse, with them.
template <class T>
struct FusedPassOfRows : FusedPass {
  const Problem<T>& problem;
  T* const row_lse;
  const AlignedArray<double> totals;
  std::optional<RowSums<T>> sums = {};

  void start(int64_t groups) { sums.emplace(problem, groups); }

  void logits(const SweepTile<T>& tile, int64_t group, T* terms, double* scales) {
    sums->add(tile.rows, tile.columns, tile.problem * problem.p.n + tile.first_row, group, terms, scales);
  }

  bool finish_rows(int64_t b, int64_t first, int64_t count) {
    const int64_t row = b * problem.p.n + first;
    double* const own = totals.get() + row;
    for (int64_t k = 0; k < count; ++k) row_lse[row + k] = T(own[k] = sums->value(row + k));
    return std::all_of(own, own + count, [](double total) { return total < INFINITY; });
  }

  double log_total(int64_t b, int64_t i) const { return totals.get()[b * problem.p.n + i]; }
};

template <class T>
bool forward_by_tiles(const Problem<T>& batched, T* row_lse, const SideGradients<T>& grad_p,
                      const SideGradients<T>& grad_q, int threads) {
  const Problem<T> problem = flattened(batched);
  if (grad_p.wanted() || grad_q.wanted()) {
    FusedPassOfRows<T> pass{{true, 1.0}, problem, row_lse, AlignedArray<double>(problem.rows())};
    if (sweep_gradients(problem, LogWeights::kKept, grad_p, grad_q, threads, pass)) return true;
    forward_by_tiles(batched, row_lse, {}, {}, threads);
    overlap_lse_backward(batched, filled(problem.rows(), T(1)).get(), row_lse, grad_p, grad_q, threads);
    return false;
  }
  threads = useful_threads(problem, threads);
  PackedColumns<T> columns(problem, LogWeights::kKept, Products::kYes);
  const int64_t tiles = num_row_tiles(problem), groups = value_groups(problem, columns);
  const int64_t blocks = value_blocks(tiles, groups);
  // Stripes that one task alone reads are packed when it reads them.
  if (blocks > 1 || problem.batch != problem.q.batch) columns.pack_all(problem, threads);
  RowSums<T> sums(problem, groups);
  parallel_for(problem.batch * blocks * groups, threads, [&](int64_t task) {
    const int64_t group = task % groups, b = task / groups / blocks, item = problem.q.item(b);
    const Part block = part(tiles, blocks, task / groups % blocks), stripes = part(columns.stripes(), groups, group);
    const AlignedArray<T> memory = columns.memory_of_stripe();
    T* const logits = scratch<T>(kTileRows * columns.stride());
    double maxima[kTileRows];
    for (int64_t s = stripes.begin; s < stripes.end; ++s) {
      Stripe<T> stripe = columns.stripe(problem, item, s, memory.get());
      for (int64_t tile = block.begin; tile < block.end; ++tile) {
        interruption_point();
        sums.add(row_tile(problem, b, tile), stripe, b * problem.p.n + tile * kTileRows, group, logits, maxima);
        stripe.upcoming = 0;
      }
    }
  });
  sums.write(row_lse);
  return true;
}

}   // namespace

template <class T>
bool overlap_lse_forward(const Problem<T>& problem, T* row_lse, const SideGradients<T>& grad_p,
                         const SideGradients<T>& grad_q, int threads) {
  if (!has_tiny_rows(problem)) return forward_by_tiles(problem, row_lse, grad_p, grad_q, threads);
  const int64_t m = problem.q.n, dim = problem.dim;
  bool fused = true;
  for (const Part& part : tiny_rows<T>(problem, nullptr, row_lse, grad_p, grad_q, threads))
    fused &= forward_by_tiles(slice(problem, part), row_lse + part.begin, slice(grad_p, part, 1, dim),
                              slice(grad_q, part, m, dim), threads);
  return fused;
}

CSDIV_INSTANTIATE(overlap_lse_forward);

}   // namespace csdiv::cpu
