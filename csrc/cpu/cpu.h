// The entry points of the CPU backend; bindings.cpp describes and checks their arguments.
// Logits and values are relative to E: log 2 (sum_d log2 c - E) / 2 stands for the log determinant, and the constants
// of the density and of uniform weights are left out as well.
#pragma once

#include "cpu/kernels/tile.h"
#include "cpu/mixture.h"

namespace csdiv::cpu {

// Each null: not wanted. Every other one is overwritten, or added to.
template <class T>
struct SideGradients {
  T* means = nullptr;         // (batch, n, dim) of the side
  T* variances = nullptr;     // (batch, n, dim)
  T* log_weights = nullptr;   // (batch, n)
  bool add = false;

  bool wanted() const { return means || variances || log_weights; }
  // Those of the components from `first` on, of all items in one row.
  SideGradients from(int64_t first, int64_t dim) const {
    const auto at = [](T* gradients, int64_t k) { return gradients ? gradients + k : nullptr; };
    return {at(means, first * dim), at(variances, first * dim), at(log_weights, first), add};
  }
  SideGradients added_to() const { return {means, variances, log_weights, true}; }
};

// Float32 numbers that `rounds` rounds of TileKernels::arithmetic compute on `threads` threads at once.
int64_t arithmetic(int64_t rounds, Arithmetic kind, int threads);

// row_lse[b, i] = LSE_j logit_ij. The gradients of sum_bi row_lse[b, i] are computed in the same pass over the pairs.
// Forward passes return false where that took another pass, because a row, a value or a sum is not finite.
template <class T>
bool overlap_lse_forward(const Problem<T>& problem, T* row_lse, const SideGradients<T>& grad_p,
                         const SideGradients<T>& grad_q, int threads);

// Gradients of sum_bi grad_row_lse[b, i] (log a_i + row_lse[b, i]).
template <class T>
void overlap_lse_backward(const Problem<T>& problem, const T* grad_row_lse, const T* row_lse,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

// values[b] = LSE_i (log a_i + row_lse[b, i]). The gradients of sum_b factor values[b] are computed in the same pass
// over the pairs; a side that wants any has one item for each problem.
template <class T>
bool log_overlap_forward(const Problem<T>& problem, T factor, double* values, T* row_lse,
                         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

// Gradients of sum_b factor grad_values[b] values[b].
template <class T>
void log_overlap_backward(const Problem<T>& problem, T factor, const T* grad_values, const double* values,
                          const T* row_lse, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                          int threads);

// values[b] = log sum_ij a_i a_j exp(logit_ij without weights); gradients of sum_b factor values[b] in the same pass.
template <class T>
bool self_overlap_forward(int64_t dim, const Mixture<T>& p, T factor, double* values, const SideGradients<T>& grad,
                          int threads);

template <class T>
void self_overlap_backward(int64_t dim, const Mixture<T>& p, const T* grad_values, const double* values,
                           const SideGradients<T>& grad, int threads);

// values[b] = (pp + qq) / 2 - pq from the three log overlaps, overlaps[b] = (pq, pp, qq). The scales cancel:
// E_pq = (E_pp + E_qq) / 2. Gradients of sum_b values[b] in the same pass; a side that wants any has one item for each
// problem.
template <class T>
bool cs_divergence_forward(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                           const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

template <class T>
void cs_divergence_backward(const Problem<T>& problem, const T* grad_values, const T* row_lse, const double* overlaps,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads);

// values[b, i] = D_CS of component i of p, by itself, from q; nothing is left out. With `logarithms`, the variances of
// p and the gradients to them are those of log variances. self_overlaps[b] = log V(q, q), which `known`, (batch), holds
// if it is not null. Scale exponents and precisions are made here. Gradients of the sum of all values in the same pass.
template <class T>
void component_divergence_forward(Problem<T> problem, bool logarithms, const double* known, T* values, T* row_lse,
                                  double* self_overlaps, const SideGradients<T>& grad_p, const SideGradients<T>& grad_q,
                                  double* grad_known, int threads);

template <class T>
void component_divergence_backward(Problem<T> problem, bool logarithms, const double* known, const T* grad_values,
                                   const T* row_lse, const double* self_overlaps, const SideGradients<T>& grad_p,
                                   const SideGradients<T>& grad_q, double* grad_known, int threads);

// values[b, i, j] = logit_ij without weights; nothing is left out.
template <class T>
void pairwise_forward(const Problem<T>& problem, T* values, int threads);

template <class T>
void pairwise_backward(const Problem<T>& problem, const T* grad_values, const SideGradients<T>& grad_p,
                       const SideGradients<T>& grad_q, int threads);

// assignment[b, i] = argmax_j logit_ij, as torch.argmax.
template <class T>
void assign(const Problem<T>& problem, int64_t* assignment, int threads);

// Full covariances, dim at most kMaxFullDim: `variances`, also of gradients, are symmetric matrices (batch, n, dim,
// dim), whose lower triangles are read. Nothing is left out of the values. A sum of two that is not positive definite
// makes its pair NaN. Where p has no variances its components are points, against which each component of q is factored
// once, and p has no gradients to variances; not for a self overlap.
void full_overlap_lse_forward(const Problem<double>& problem, double* row_lse, int threads);

void full_overlap_lse_backward(const Problem<double>& problem, const double* grad_row_lse, const double* row_lse,
                               const SideGradients<double>& grad_p, const SideGradients<double>& grad_q, int threads);

// row_lse[b, i] = LSE over j >= i, where pairs j > i count twice; p and q are the same mixtures. Gradients of
// sum_bi grad_row_lse[b, i] (log a_i + row_lse[b, i]).
void full_self_overlap_forward(const Problem<double>& problem, double* row_lse, int threads);

void full_self_overlap_backward(const Problem<double>& problem, const double* grad_row_lse, const double* row_lse,
                                const SideGradients<double>& grad, int threads);

void full_pairwise_forward(const Problem<double>& problem, double* values, int threads);

void full_pairwise_backward(const Problem<double>& problem, const double* grad_values,
                            const SideGradients<double>& grad_p, const SideGradients<double>& grad_q, int threads);

void full_assign(const Problem<double>& problem, int64_t* assignment, int threads);

}   // namespace csdiv::cpu
