#include <algorithm>

#include "cpu.h"
#include "pack.h"

namespace csdiv::cpu {

template <class T>
bool cs_divergence_by_terms(const Problem<T>& problem, T* divergence, T* rows, double* overlaps,
                            SideGradients<T> grad_p, SideGradients<T> grad_q, int threads) {
  const AlignedArray<double> pq(problem.batch), pp(problem.p.batch), qq(problem.q.batch);
  bool once = log_overlap_forward(problem, T(-1), rows, pq.get(), grad_p, grad_q, threads);
  grad_p.add = grad_q.add = true;
  once &= self_overlap_forward(problem.dim, problem.p, T(0.5), pp.get(), grad_p, threads);
  once &= self_overlap_forward(problem.dim, problem.q, T(0.5), qq.get(), grad_q, threads);
  for (int64_t b = 0; b < problem.batch; ++b) {
    double* const terms = overlaps + 3 * b;
    terms[0] = pq.get()[b];
    terms[1] = pp.get()[problem.p.item(b)];
    terms[2] = qq.get()[problem.q.item(b)];
    divergence[b] = T(0.5 * (terms[1] + terms[2]) - terms[0]);
  }
  return once;
}

template <class T>
bool cs_divergence_forward(const Problem<T>& problem, T* divergence, T* rows, double* overlaps, SideGradients<T> grad_p,
                           SideGradients<T> grad_q, int threads) {
  if (fits_lanes(problem)) return cs_divergence_in_lanes(problem, divergence, rows, overlaps, grad_p, grad_q, threads);
  return cs_divergence_by_terms(problem, divergence, rows, overlaps, grad_p, grad_q, threads);
}

template <class T>
void cs_divergence_backward(const Problem<T>& problem, const T* grad, const T* rows, const double* overlaps,
                            SideGradients<T> grad_p, SideGradients<T> grad_q, int threads) {
  const AlignedArray<double> pq(problem.batch);
  for (int64_t b = 0; b < problem.batch; ++b) pq.get()[b] = overlaps[3 * b];
  log_overlap_backward(problem, grad, T(-1), rows, pq.get(), grad_p, grad_q, threads);

  // The self terms are added, each once for all problems that share it.
  const auto add_self_term = [&](const Mixture<T>& side, int term, SideGradients<T> grads) {
    if (!grads.wanted()) return;
    const AlignedArray<T> half(side.batch);
    const AlignedArray<double> values(side.batch);
    std::fill_n(half.get(), side.batch, T(0));
    for (int64_t b = 0; b < problem.batch; ++b) {
      half.get()[side.item(b)] += T(0.5) * grad[b];
      values.get()[side.item(b)] = overlaps[3 * b + term];
    }
    grads.add = true;
    self_overlap_backward(problem.dim, side, values.get(), half.get(), grads, threads);
  };
  add_self_term(problem.p, 1, grad_p);
  add_self_term(problem.q, 2, grad_q);
}

template bool cs_divergence_by_terms(const Problem<float>&, float*, float*, double*, SideGradients<float>,
                                     SideGradients<float>, int);
template bool cs_divergence_by_terms(const Problem<double>&, double*, double*, double*, SideGradients<double>,
                                     SideGradients<double>, int);
template bool cs_divergence_forward(const Problem<float>&, float*, float*, double*, SideGradients<float>,
                                    SideGradients<float>, int);
template bool cs_divergence_forward(const Problem<double>&, double*, double*, double*, SideGradients<double>,
                                    SideGradients<double>, int);
template void cs_divergence_backward(const Problem<float>&, const float*, const float*, const double*,
                                     SideGradients<float>, SideGradients<float>, int);
template void cs_divergence_backward(const Problem<double>&, const double*, const double*, const double*,
                                     SideGradients<double>, SideGradients<double>, int);

}   // namespace csdiv::cpu
