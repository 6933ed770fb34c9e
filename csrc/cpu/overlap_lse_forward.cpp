#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu.h"
#include "gradient_sweep.h"
#include "row_sums.h"

namespace csdiv::cpu {
namespace {

// The gradients of the sum of all rows, with the rows.
template <class T>
class OnlyPassOfRows : public OnlyPass {
 public:
  OnlyPassOfRows(const Problem<T>& problem, T* rows)
      : OnlyPass{true, 1.0}, problem_(problem), rows_(rows), totals_(problem.rows()) {}

  void start(int64_t groups) { sums_.emplace(problem_, groups); }

  void logits(const SweepTile<T>& tile, int64_t group, T* terms, double* scales) {
    sums_->add(tile.rows, tile.columns, tile.problem * problem_.p.n + tile.first_row, group, terms, scales);
  }

  bool finish_rows(int64_t b, int64_t first, int64_t count) {
    double* const totals = totals_.get() + b * problem_.p.n + first;
    T* const rows = rows_ + b * problem_.p.n + first;
    for (int64_t k = 0; k < count; ++k) rows[k] = T(totals[k] = sums_->value(b * problem_.p.n + first + k));
    return std::all_of(totals, totals + count, [](double total) { return total < INFINITY; });
  }

  bool finish() { return true; }

  double log_total(int64_t b, int64_t i) const { return totals_.get()[b * problem_.p.n + i]; }

 private:
  const Problem<T>& problem_;
  T* const rows_;
  AlignedArray<double> totals_;
  std::optional<RowSums<T>> sums_;
};

}   // namespace

template <class T>
bool overlap_lse_forward(const Problem<T>& batched, T* rows, const SideGradients<T>& grad_p,
                         const SideGradients<T>& grad_q, int threads) {
  const Problem<T> problem = flattened(batched);
  if (grad_p.wanted() || grad_q.wanted()) {
    OnlyPassOfRows<T> pass(problem, rows);
    if (sweep_gradients(problem, LogWeights::kKept, grad_p, grad_q, threads, pass)) return true;
    overlap_lse_forward(batched, rows, {}, {}, threads);
    const AlignedArray<T> ones(problem.rows());
    std::fill_n(ones.get(), ones.size(), T(1));
    overlap_lse_backward(batched, rows, ones.get(), grad_p, grad_q, threads);
    return false;
  }
  threads = useful_threads(problem, threads);
  PackedColumns<T> columns(problem, LogWeights::kKept, Products::kYes);
  const int64_t tiles = num_row_tiles(problem), groups = value_groups(problem, columns);
  const int64_t blocks = value_blocks(tiles, groups);
  // Stripes that one task alone reads are packed when it reads them.
  const bool on_demand = blocks == 1 && problem.batch == problem.q.batch;
  if (!on_demand) columns.pack_all(problem, threads);
  RowSums<T> sums(problem, groups);
  parallel_for(problem.batch * blocks * groups, threads, [&](int64_t task) {
    const int64_t group = task % groups, b = task / groups / blocks, item = problem.q.item(b);
    const Part block = part(tiles, blocks, task / groups % blocks), stripes = part(columns.stripes(), groups, group);
    const AlignedArray<T> memory(on_demand ? columns.stripe_size() : 0);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    double maxima[kTileRows];
    for (int64_t s = stripes.begin; s < stripes.end; ++s) {
      const Stripe<T> stripe = on_demand ? columns.pack(problem, item, s, memory.get()) : columns.stripe(item, s);
      for (int64_t tile = block.begin; tile < block.end; ++tile)
        sums.add(row_tile(problem, b, tile), stripe, b * problem.p.n + tile * kTileRows, group, logits, maxima);
    }
  });
  sums.write(rows);
  return true;
}

template bool overlap_lse_forward(const Problem<float>&, float*, const SideGradients<float>&,
                                  const SideGradients<float>&, int);
template bool overlap_lse_forward(const Problem<double>&, double*, const SideGradients<double>&,
                                  const SideGradients<double>&, int);

}   // namespace csdiv::cpu
