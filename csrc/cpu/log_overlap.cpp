#include <algorithm>
#include <cmath>
#include <optional>

#include "gradient_sweep.h"
#include "log_sum_exp.h"
#include "row_sums.h"

namespace csdiv::cpu {
namespace {

// log a_i + row_i; a component of weight zero counts nothing, whatever its row, and an infinite weight is none.
template <class T>
double row_logit(const Problem<T>& problem, int64_t b, int64_t i, double row) {
  const double log_weight = problem.p.log_weight(problem.p.item(b), i);
  if (log_weight == INFINITY) return NAN;
  return log_weight == -INFINITY ? -INFINITY : log_weight + row;
}

template <class T>
void total_rows(const Problem<T>& problem, const T* rows, double* values) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    LogSumExp total;
    for (int64_t i = 0; i < problem.p.n; ++i) total.add_one(row_logit(problem, b, i, rows[b * problem.p.n + i]));
    values[b] = total.value();
  }
}

// Values and gradients at once. `problem` is the flattened form of `batched`.
template <class T>
class OnlyPassOfPair : public OnlyPass {
 public:
  OnlyPassOfPair(const Problem<T>& batched, const Problem<T>& problem, double factor, T* rows, double* values)
      : OnlyPass{false, factor}, batched_(batched), problem_(problem), rows_(rows), values_(values) {}

  void start(int64_t groups) { sums_.emplace(problem_, groups); }

  void logits(const SweepTile<T>& tile, int64_t group, T* terms, double* scales) {
    sums_->add(tile.rows, tile.columns, tile.problem * problem_.p.n + tile.first_row, group, terms, scales);
    for (int64_t r = 0; r < tile.rows.count; ++r)
      scales[r] = row_logit(problem_, tile.problem, tile.first_row + r, scales[r]);
  }

  bool finish_rows(int64_t, int64_t, int64_t) { return true; }

  bool finish() {
    sums_->write(rows_);
    total_rows(batched_, rows_, values_);
    return std::all_of(values_, values_ + batched_.batch, [](double value) { return std::isfinite(value); });
  }

  double log_total(int64_t b, int64_t i) const { return values_[(b * problem_.p.n + i) / batched_.p.n]; }

 private:
  const Problem<T>&batched_, &problem_;
  T* const rows_;
  double* const values_;
  std::optional<RowSums<T>> sums_;
};

}   // namespace

template <class T>
void offsets(const Problem<T>& problem, Uniform uniform, double* offsets) {
  constexpr double kLog2 = 0.69314718055994530942, kLog2Pi = 1.8378770664093454836;
  double log_uniform = 0;
  if (uniform != Uniform::kNone && !problem.q.log_weights) log_uniform -= std::log(double(problem.q.n));
  if (uniform == Uniform::kOfBoth && !problem.p.log_weights) log_uniform -= std::log(double(problem.p.n));
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t exponents =
        problem.p.scale_exponent(problem.p.item(b), 0) + problem.q.scale_exponent(problem.q.item(b), 0);
    offsets[b] = log_uniform - 0.5 * (0.5 * kLog2 * double(exponents) + double(problem.dim) * kLog2Pi);
  }
}

template <class T>
bool log_overlap_forward(const Problem<T>& batched, T factor, T* rows, double* values, const SideGradients<T>& grad_p,
                         const SideGradients<T>& grad_q, int threads) {
  if (!grad_p.wanted() && !grad_q.wanted()) {
    overlap_lse_forward(batched, rows, {}, {}, threads);
    total_rows(batched, rows, values);
    return true;
  }
  const Problem<T> problem = flattened(batched);
  OnlyPassOfPair<T> pass(batched, problem, factor, rows, values);
  if (sweep_gradients(problem, LogWeights::kKept, grad_p, grad_q, threads, pass)) return true;
  log_overlap_forward(batched, factor, rows, values, {}, {}, threads);
  const AlignedArray<T> ones(batched.batch);
  std::fill_n(ones.get(), batched.batch, T(1));
  log_overlap_backward(batched, ones.get(), factor, rows, values, grad_p, grad_q, threads);
  return false;
}

template <class T>
void log_overlap_backward(const Problem<T>& problem, const T* grad_values, T factor, const T* rows,
                          const double* values, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                          int threads) {
  const int64_t n = problem.p.n;
  const AlignedArray<T> grad_rows(problem.batch * n);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const double logit = row_logit(problem, b, i, rows[b * n + i]);
      const double share = logit == -INFINITY ? 0 : std::exp(logit - values[b]);
      grad_rows.get()[b * n + i] = share == 0 ? T(0) : T(factor * grad_values[b] * share);
    }
  }
  overlap_lse_backward(problem, rows, grad_rows.get(), grad_p, grad_q, threads);
}

template void offsets(const Problem<float>&, Uniform, double*);
template void offsets(const Problem<double>&, Uniform, double*);
template bool log_overlap_forward(const Problem<float>&, float, float*, double*, const SideGradients<float>&,
                                  const SideGradients<float>&, int);
template bool log_overlap_forward(const Problem<double>&, double, double*, double*, const SideGradients<double>&,
                                  const SideGradients<double>&, int);
template void log_overlap_backward(const Problem<float>&, const float*, float, const float*, const double*,
                                   const SideGradients<float>&, const SideGradients<float>&, int);
template void log_overlap_backward(const Problem<double>&, const double*, double, const double*, const double*,
                                   const SideGradients<double>&, const SideGradients<double>&, int);

}   // namespace csdiv::cpu
