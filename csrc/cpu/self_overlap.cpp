#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/sweep/gradient_sweep.h"
#include "cpu/sweep/log_sum_exp.h"

namespace csdiv::cpu {
namespace {

template <class T>
Problem<T> with_itself(int64_t dim, const Mixture<T>& p) {
  Problem<T> problem{p.batch, dim, p, p};
  problem.p.index = problem.q.index = nullptr;   // of the pair that p may come from
  problem.p.log_weights = nullptr;               // added below
  problem.p.precisions = nullptr;                // of the pair as well
  return problem;
}

// Logits of row i against columns j > i, and those of the pairs (i, i). Stripes begin and end with a tile of rows, so a
// tile's diagonal lies in the stripe, all of it, or before it.
template <class T>
struct UpperLogits {
  T diagonal[kTileRows];   // -inf: outside of the tile
  int64_t first_column;    // what is before it was not written

  UpperLogits(const SweepTile<T>& tile, T* logits) : first_column(first_in_triangle<T>(tile.diagonal(0))) {
    tile_kernels<T>().logits(tile.rows, tile.columns, first_column, logits);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      T* const row = logits + r * tile.columns.stride;
      const int64_t column = tile.diagonal(r);
      diagonal[r] = column >= 0 ? row[column] : -T(INFINITY);
      if (column >= 0) std::fill(row + first_column, row + column + 1, -T(INFINITY));
    }
  }
};

// values[b] = LSE_ij (log a_i + logit_ij), in parts: one for each row tile and column group. Pairs j > i count twice.
template <class T>
class SelfSums {
 public:
  SelfSums(int64_t dim, const Mixture<T>& p, int64_t groups)
      : p_(p), tiles_(num_row_tiles(with_itself(dim, p))), sums_(p.batch * tiles_, groups) {}

  // One tile more; each logit of row r becomes exp(logit - maxima[r]).
  void add(const SweepTile<T>& tile, int64_t group, const UpperLogits<T>& upper, T* logits, T* maxima) {
    LogSumExp& total = sums_.at(tile.problem * tiles_ + tile.first_row / kTileRows, group);
    PartialSum<T> sums[kTileRows];
    tile_kernels<T>().partial_sums(logits + upper.first_column, tile.rows.count, tile.columns.stride,
                                   tile.columns.padded - upper.first_column, sums);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      const double log_weight = p_.log_weight(tile.problem, tile.first_row + r);
      maxima[r] = -T(INFINITY);
      if (!counts(log_weight)) continue;
      total.add_one(log_weight + upper.diagonal[r]);
      total.add_scaled(sums[r].max, 2 * sums[r].sum, log_weight);
      maxima[r] = sums[r].max;
    }
  }

  void write(double* values) const {
    for (int64_t b = 0; b < p_.batch; ++b) values[b] = sums_.value(b * tiles_, (b + 1) * tiles_);
  }

 private:
  const Mixture<T>& p_;
  const int64_t tiles_;
  PartialSums sums_;
};

// The value and its gradients at once: equation (6), twice the one-sided gradients. A pair j > i counts for both of its
// components at once; the pair (i, i), swept as a row and as a column, counts half for each.
template <class T>
struct FusedPassOfSelf : FusedPass {
  const int64_t dim;
  const Mixture<T>& p;
  double* const values;
  std::optional<SelfSums<T>> sums = {};

  void start(int64_t groups) { sums.emplace(dim, p, groups); }

  void logits(const SweepTile<T>& tile, int64_t group, T* terms, double* scales) {
    const UpperLogits<T> upper(tile, terms);
    T maxima[kTileRows];
    sums->add(tile, group, upper, terms, maxima);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      T* const row = terms + r * tile.columns.stride;
      std::fill_n(row, upper.first_column, T(0));
      const double log_weight = p.log_weight(tile.problem, tile.first_row + r);
      T top = maxima[r];
      if (counts(log_weight) && upper.diagonal[r] != -INFINITY) {
        if (upper.diagonal[r] > top) {
          const T rise = std::exp(top - upper.diagonal[r]);
          for (int64_t j = 0; j < tile.columns.padded; ++j) row[j] *= rise;
          top = upper.diagonal[r];
        }
        row[tile.diagonal(r)] = T(0.5) * std::exp(upper.diagonal[r] - top);
      }
      scales[r] = counts(log_weight) ? kLog2 + log_weight + top : log_weight;
    }
  }

  bool finish() {
    sums->write(values);
    return std::all_of(values, values + p.batch, [](double value) { return std::isfinite(value); });
  }

  double log_total(int64_t b, int64_t) const { return values[b]; }
};

}   // namespace

template <class T>
bool self_overlap_forward(int64_t dim, const Mixture<T>& p, T factor, double* values, const SideGradients<T>& grad,
                          int threads) {
  const Problem<T> problem = with_itself(dim, p);
  if (grad.wanted()) {
    FusedPassOfSelf<T> pass{{false, factor}, dim, p, values};
    if (sweep_self_gradients(problem, grad, threads, pass)) return true;
    self_overlap_forward(dim, p, factor, values, {}, threads);
    self_overlap_backward(dim, p, filled(p.batch, factor).get(), values, grad, threads);
    return false;
  }
  threads = useful_threads(problem, threads);
  const PackedColumns<T> columns(problem, LogWeights::kKept, threads, Products::kYes);
  const int64_t tiles = num_row_tiles(problem), groups = value_groups(problem, columns);
  SelfSums<T> sums(dim, p, groups);
  parallel_for(p.batch * tiles * groups, threads, [&](int64_t task) {
    const int64_t group = task % groups, b = task / groups / tiles, first = task / groups % tiles * kTileRows;
    const RowTile<T> rows = row_tile(problem, b, first / kTileRows);
    const Part stripes = part(columns.stripes(), groups, group);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    T maxima[kTileRows];
    for (int64_t s = std::max(stripes.begin, first / columns.width()); s < stripes.end; ++s) {
      const SweepTile<T> tile{b, first, s * columns.width(), rows, columns.stripe(b, s)};
      interruption_point();
      sums.add(tile, group, UpperLogits<T>(tile, logits), logits, maxima);
    }
  });
  sums.write(values);
  return true;
}

template <class T>
void self_overlap_backward(int64_t dim, const Mixture<T>& p, const T* grad_values, const double* values,
                           const SideGradients<T>& grad, int threads) {
  if (!grad.wanted()) return;
  const Problem<T> problem = with_itself(dim, p);
  // r_ij = exp(log a_i + logit_ij - log V).
  const auto fill = [&](const SweepTile<T>& tile, T* weights) {
    T log_normalizers[kTileRows], grads[kTileRows];
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      const T log_weight = p.log_weight(tile.problem, tile.first_row + r);
      log_normalizers[r] = T(values[tile.problem] - double(log_weight));
      grads[r] = !counts(log_weight) || std::isinf(values[tile.problem]) ? T(0) : 2 * grad_values[tile.problem];
    }
    const UpperLogits<T> upper(tile, weights);
    for (int64_t r = 0; r < tile.rows.count; ++r)
      std::fill_n(weights + r * tile.columns.stride, upper.first_column, -T(INFINITY));
    uint32_t active = tile_kernels<T>().weights(tile.rows, tile.columns, {log_normalizers, grads}, weights,
                                                tile.column_sums, tile.row_sums);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      if (grads[r] == 0 || upper.diagonal[r] == -INFINITY) continue;
      const int64_t j = tile.diagonal(r);
      const T logit = upper.diagonal[r] - log_normalizers[r];
      const T weight = T(0.5) * grads[r] * std::exp(logit > 0 ? T(0) : logit);
      weights[r * tile.columns.stride + j] = weight;
      tile.column_sums[j] += weight;
      tile.row_sums[r] += weight;
      active |= uint32_t(1) << r;
    }
    return active;
  };
  sweep_self_gradients(problem, grad, threads, fill);
}

CSDIV_INSTANTIATE(self_overlap_forward);
CSDIV_INSTANTIATE(self_overlap_backward);

}   // namespace csdiv::cpu
