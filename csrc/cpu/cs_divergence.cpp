#include <algorithm>

#include "cpu.h"
#include "pack.h"

namespace csdiv::cpu {

template <class T>
void cs_divergence_forward(const Problem<T>& problem, T* divergence, const Overlaps<T>& overlaps, int threads) {
  log_overlap_forward(problem, overlaps.rows, overlaps.pq, threads);
  self_overlap_forward(problem.dim, problem.p, overlaps.pp, threads);
  self_overlap_forward(problem.dim, problem.q, overlaps.qq, threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    const double self_terms = overlaps.pp[problem.p.item(b)] + overlaps.qq[problem.q.item(b)];
    divergence[b] = T(0.5 * self_terms - overlaps.pq[b]);
  }
}

template <class T>
void cs_divergence_backward(const Problem<T>& problem, const T* grad, const Overlaps<T>& overlaps,
                            SideGradients<T> grad_p, SideGradients<T> grad_q, int threads) {
  log_overlap_backward(problem, grad, T(-1), overlaps.rows, overlaps.pq, grad_p, grad_q, threads);

  // The self terms are added, each once for all problems that share it.
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
