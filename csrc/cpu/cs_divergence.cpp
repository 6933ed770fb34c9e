#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/system/memory.h"
#include "cpu/tiny.h"

namespace csdiv::cpu {
namespace {

template <class T>
bool forward_by_terms(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                      const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  const AlignedArray<double> pq(problem.batch), pp(problem.p.batch), qq(problem.q.batch);
  bool fused = log_overlap_forward(problem, T(-1), pq.get(), row_lse, grad_p, grad_q, threads);
  fused &= self_overlap_forward(problem.dim, problem.p, T(0.5), pp.get(), grad_p.added_to(), threads);
  fused &= self_overlap_forward(problem.dim, problem.q, T(0.5), qq.get(), grad_q.added_to(), threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    double* const terms = overlaps + 3 * b;
    terms[0] = pq.get()[b];
    terms[1] = pp.get()[problem.p.item(b)];
    terms[2] = qq.get()[problem.q.item(b)];
    values[b] = T(0.5 * (terms[1] + terms[2]) - terms[0]);
  }
  return fused;
}

}   // namespace

template <class T>
bool cs_divergence_forward(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                           const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  if (!is_tiny(problem)) return forward_by_terms(problem, values, row_lse, overlaps, grad_p, grad_q, threads);
  const int64_t n = problem.p.n, m = problem.q.n, dim = problem.dim;
  bool fused = true;
  for (const Part& part : tiny_divergence(problem, values, row_lse, overlaps, grad_p, grad_q, threads))
    fused &=
        forward_by_terms(slice(problem, part), values + part.begin, row_lse + part.begin * n, overlaps + 3 * part.begin,
                         slice(grad_p, part, n, dim), slice(grad_q, part, m, dim), threads);
  return fused;
}

template <class T>
void cs_divergence_backward(const Problem<T>& problem, const T* grad_values, const T* row_lse, const double* overlaps,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  const AlignedArray<double> pq(problem.batch);
  for (int64_t b = 0; b < problem.batch; ++b) pq.get()[b] = overlaps[3 * b];
  log_overlap_backward(problem, T(-1), grad_values, pq.get(), row_lse, grad_p, grad_q, threads);

  // The self terms are added, each once for all problems that share it.
  const auto add_self_term = [&](const Mixture<T>& side, int term, const SideGradients<T>& grads) {
    if (!grads.wanted()) return;
    const AlignedArray<T> half = filled(side.batch, T(0));
    const AlignedArray<double> values(side.batch);
    for (int64_t b = 0; b < problem.batch; ++b) {
      half.get()[side.item(b)] += T(0.5) * grad_values[b];
      values.get()[side.item(b)] = overlaps[3 * b + term];
    }
    self_overlap_backward(problem.dim, side, half.get(), values.get(), grads.added_to(), threads);
  };
  add_self_term(problem.p, 1, grad_p);
  add_self_term(problem.q, 2, grad_q);
}

CSDIV_INSTANTIATE(cs_divergence_forward);
CSDIV_INSTANTIATE(cs_divergence_backward);

}   // namespace csdiv::cpu
