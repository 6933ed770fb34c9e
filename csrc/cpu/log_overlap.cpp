#include <cmath>

#include "cpu.h"
#include "log_sum_exp.h"
#include "pack.h"

namespace csdiv::cpu {
namespace {

// log a_i + row_i; a component of weight zero counts nothing, whatever its row.
template <class T>
double row_logit(const Problem<T>& problem, int64_t b, int64_t i, const T* rows) {
  const double log_weight = problem.p.log_weight(problem.p.item(b), i);
  return log_weight == -INFINITY ? -INFINITY : log_weight + rows[b * problem.p.n + i];
}

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
void log_overlap_forward(const Problem<T>& problem, T* rows, double* values, int threads) {
  overlap_lse_forward(problem, rows, threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    LogSumExp total;
    for (int64_t i = 0; i < problem.p.n; ++i) total.add_one(row_logit(problem, b, i, rows));
    values[b] = total.value();
  }
}

template <class T>
void log_overlap_backward(const Problem<T>& problem, const T* grad_values, T factor, const T* rows,
                          const double* values, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                          int threads) {
  const int64_t n = problem.p.n;
  const AlignedArray<T> grad_rows(problem.batch * n);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const double logit = row_logit(problem, b, i, rows);
      const double share = logit == -INFINITY ? 0 : std::exp(logit - values[b]);
      grad_rows.get()[b * n + i] = share == 0 ? T(0) : T(factor * grad_values[b] * share);
    }
  }
  overlap_lse_backward(problem, rows, grad_rows.get(), grad_p, grad_q, threads);
}

template void offsets(const Problem<float>&, Uniform, double*);
template void offsets(const Problem<double>&, Uniform, double*);
template void log_overlap_forward(const Problem<float>&, float*, double*, int);
template void log_overlap_forward(const Problem<double>&, double*, double*, int);
template void log_overlap_backward(const Problem<float>&, const float*, float, const float*, const double*,
                                   const SideGradients<float>&, const SideGradients<float>&, int);
template void log_overlap_backward(const Problem<double>&, const double*, double, const double*, const double*,
                                   const SideGradients<double>&, const SideGradients<double>&, int);

}   // namespace csdiv::cpu
