#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/sweep/gradient_sweep.h"
#include "cpu/sweep/log_sum_exp.h"
#include "cpu/sweep/row_sums.h"

namespace csdiv::cpu {
namespace {

// log a_i + row_lse_i
template <class T>
double row_logit(const Problem<T>& problem, int64_t b, int64_t i, double row_lse) {
  const double log_weight = problem.p.log_weight(problem.p.item(b), i);
  return counts(log_weight) ? log_weight + row_lse : log_weight;
}

template <class T>
void total_rows(const Problem<T>& problem, const T* row_lse, double* values) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    LogSumExp total;
    for (int64_t i = 0; i < problem.p.n; ++i) total.add_one(row_logit(problem, b, i, row_lse[b * problem.p.n + i]));
    values[b] = total.value();
  }
}

// Values and gradients at once. `problem` is the flattened form of `batched`.
template <class T>
struct FusedPassOfPair : FusedPass {
  const Problem<T>&batched, &problem;
  double* const values;
  T* const row_lse;
  std::optional<RowSums<T>> sums = {};

  void start(int64_t groups) { sums.emplace(problem, groups); }

  void logits(const SweepTile<T>& tile, int64_t group, T* terms, double* scales) {
    sums->add(tile.rows, tile.columns, tile.problem * problem.p.n + tile.first_row, group, terms, scales);
    for (int64_t r = 0; r < tile.rows.count; ++r)
      scales[r] = row_logit(problem, tile.problem, tile.first_row + r, scales[r]);
  }

  bool finish() {
    sums->write(row_lse);
    total_rows(batched, row_lse, values);
    return std::all_of(values, values + batched.batch, [](double value) { return std::isfinite(value); });
  }

  double log_total(int64_t b, int64_t i) const { return values[(b * problem.p.n + i) / batched.p.n]; }
};

}   // namespace

template <class T>
bool log_overlap_forward(const Problem<T>& batched, T factor, double* values, T* row_lse,
                         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  if (!grad_p.wanted() && !grad_q.wanted()) {
    overlap_lse_forward(batched, row_lse, {}, {}, threads);
    total_rows(batched, row_lse, values);
    return true;
  }
  const Problem<T> problem = flattened(batched);
  FusedPassOfPair<T> pass{{false, factor}, batched, problem, values, row_lse};
  if (sweep_gradients(problem, LogWeights::kKept, grad_p, grad_q, threads, pass)) return true;
  log_overlap_forward(batched, factor, values, row_lse, {}, {}, threads);
  log_overlap_backward(batched, factor, filled(batched.batch, T(1)).get(), values, row_lse, grad_p, grad_q, threads);
  return false;
}

template <class T>
void log_overlap_backward(const Problem<T>& problem, T factor, const T* grad_values, const double* values,
                          const T* row_lse, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                          int threads) {
  const int64_t n = problem.p.n;
  const AlignedArray<T> grad_row_lse(problem.batch * n);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const double logit = row_logit(problem, b, i, row_lse[b * n + i]);
      const bool nothing = grad_values[b] == 0 || logit == -INFINITY || std::isinf(values[b]);
      const double share = nothing ? 0 : std::exp(logit - values[b]);
      grad_row_lse.get()[b * n + i] = share == 0 ? T(0) : T(factor * grad_values[b] * share);
    }
  }
  overlap_lse_backward(problem, grad_row_lse.get(), row_lse, grad_p, grad_q, threads);
}

CSDIV_INSTANTIATE(log_overlap_forward);
CSDIV_INSTANTIATE(log_overlap_backward);

}   // namespace csdiv::cpu
