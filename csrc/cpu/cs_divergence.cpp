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
void cs_divergence_forward(const Problem<T>& problem, T* divergence, const Overlaps<T>& overlaps, int threads) {
  overlap_lse_forward(problem, overlaps.rows, threads);
  self_overlap_forward(problem.dim, problem.p, overlaps.pp, threads);
  self_overlap_forward(problem.dim, problem.q, overlaps.qq, threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    LogSumExp total;
    for (int64_t i = 0; i < problem.p.n; ++i) total.add_one(row_logit(problem, b, i, overlaps.rows));
    overlaps.pq[b] = total.value();
    const double self_terms = overlaps.pp[problem.p.item(b)] + overlaps.qq[problem.q.item(b)];
    divergence[b] = T(0.5 * self_terms - overlaps.pq[b]);
  }
}

template <class T>
void cs_divergence_backward(const Problem<T>& problem, const T* grad, const Overlaps<T>& overlaps,
                            SideGradients<T> grad_p, SideGradients<T> grad_q, int threads) {
  // -log V(p, q): the shares of the rows, then those of the pairs.
  const int64_t n = problem.p.n;
  const AlignedArray<T> grad_rows(problem.batch * n);
  for (int64_t b = 0; b < problem.batch; ++b) {
    for (int64_t i = 0; i < n; ++i) {
      const double logit = row_logit(problem, b, i, overlaps.rows);
      grad_rows.get()[b * n + i] = logit == -INFINITY ? T(0) : T(-grad[b] * std::exp(logit - overlaps.pq[b]));
    }
  }
  overlap_lse_backward(problem, overlaps.rows, grad_rows.get(), grad_p, grad_q, threads);

  // + log V(p, p) / 2 and + log V(q, q) / 2, each once for the problems that share it.
  const auto add_self_term = [&](const Mixture<T>& side, const double* values, SideGradients<T> grads) {
    if (!grads.wanted()) return;
    const AlignedArray<T> half(side.batch);
    std::fill_n(half.get(), side.batch, T(0));
    for (int64_t b = 0; b < problem.batch; ++b) half.get()[side.item(b)] += T(0.5) * grad[b];
    grads.add = true;
    self_overlap_backward(problem.dim, side, values, half.get(), grads, threads);
  };
  add_self_term(problem.p, overlaps.pp, grad_p);
  add_self_term(problem.q, overlaps.qq, grad_q);
}

template void cs_divergence_forward(const Problem<float>&, float*, const Overlaps<float>&, int);
template void cs_divergence_forward(const Problem<double>&, double*, const Overlaps<double>&, int);
template void cs_divergence_backward(const Problem<float>&, const float*, const Overlaps<float>&, SideGradients<float>,
                                     SideGradients<float>, int);
template void cs_divergence_backward(const Problem<double>&, const double*, const Overlaps<double>&,
                                     SideGradients<double>, SideGradients<double>, int);

}   // namespace csdiv::cpu
