// Batches of tiny problems: a problem in each lane of a vector.
#pragma once

#include <vector>

#include "cpu/cpu.h"
#include "cpu/sweep/partition.h"

namespace csdiv::cpu {

template <class T>
bool is_tiny(const Problem<T>& problem);

// As cs_divergence_forward. Returns the problems that have no result yet: these are to be computed term by term.
template <class T>
std::vector<Part> tiny_divergence(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                                  const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

// Whether each problem has one row and columns of its own, few enough.
template <class T>
bool has_tiny_rows(const Problem<T>& problem);

// row_lse and its gradients, times `grad_row_lse` where it is given. Returns the problems that have no result yet.
template <class T>
std::vector<Part> tiny_rows(const Problem<T>& problem, const T* grad_row_lse, T* row_lse,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

// Some problems, each with items of its own.
template <class T>
Problem<T> slice(Problem<T> problem, const Part& part) {
  problem.batch = part.end - part.begin;
  for (Mixture<T>* side : {&problem.p, &problem.q}) {
    side->means += part.begin * side->n * problem.dim;
    side->variances += part.begin * side->n * problem.dim;
    if (side->log_weights) side->log_weights += part.begin * side->n;
    side->scale_exponents += part.begin;
    if (side->precisions) side->precisions += part.begin * side->n * problem.dim;
    if (side->log_determinants) side->log_determinants += part.begin * side->n;
    side->batch = problem.batch;
  }
  return problem;
}

template <class T>
SideGradients<T> slice(SideGradients<T> grads, const Part& part, int64_t n, int64_t dim) {
  if (grads.means) grads.means += part.begin * n * dim;
  if (grads.variances) grads.variances += part.begin * n * dim;
  if (grads.log_weights) grads.log_weights += part.begin * n;
  return grads;
}

}   // namespace csdiv::cpu
