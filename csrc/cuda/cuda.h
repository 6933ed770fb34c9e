// The entry points of the CUDA backend; bindings.cpp describes and checks their arguments. Each launches its kernels in
// the order of the context's stream and returns; with no scratch memory it launches nothing and counts what it needs.
// Logits and what sums up rows leave out a constant, see log_offset(); values in float64 leave out nothing.
#pragma once

#include "mixture.h"

namespace csdiv::cuda {

// Each null: not wanted. Every other one is overwritten.
template <class T>
struct SideGradients {
  T* means = nullptr;         // (items, n, dim) of the side
  T* variances = nullptr;     // (items, n, dim)
  T* log_weights = nullptr;   // (items, n)

  CSDIV_HOST_DEVICE bool wanted() const { return means || variances || log_weights; }
};

// row_lse[b, i] = LSE_j logit_ij; offsets[b] is what they leave out.
template <class T>
void overlap_lse_forward(Context& context, Problem<T> problem, T* row_lse, double* offsets);

// Gradients of sum_bi grad_row_lse[b, i] row_lse[b, i]; here they leave out nothing.
template <class T>
void overlap_lse_backward(Context& context, Problem<T> problem, const T* grad_row_lse, const double* row_lse,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q);

// values[b] = log sum_ij a_i b_j exp(logit_ij); row_lse as above; the gradients of sum_b values[b].
template <class T>
void log_overlap_forward(Context& context, Problem<T> problem, double* values, T* row_lse,
                         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q);

// Gradients of sum_b grad_values[b] values[b].
template <class T>
void log_overlap_backward(Context& context, Problem<T> problem, const T* grad_values, const double* values,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q);

// The same of p with itself, one value for each of its items.
template <class T>
void self_overlap_forward(Context& context, Problem<T> problem, double* values, const SideGradients<T>& grad);

template <class T>
void self_overlap_backward(Context& context, Problem<T> problem, const T* grad_values, const double* values,
                           const SideGradients<T>& grad);

// values[b] = (pp + qq) / 2 - pq from the log overlaps, overlaps[b] = (pq, pp, qq), all on one scale.
template <class T>
void cs_divergence_forward(Context& context, Problem<T> problem, T* values, T* row_lse, double* overlaps,
                           const SideGradients<T>& grad_p, const SideGradients<T>& grad_q);

template <class T>
void cs_divergence_backward(Context& context, Problem<T> problem, const T* grad_values, const double* overlaps,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q);

// values[b, i] = D_CS of component i of p from q: p's variances are these or, with `logarithms`, their logarithms.
// row_lse leaves out what makes it minus the value; self_overlaps[b] = log V(q, q), which `known` has if that is not
// null.
template <class T>
void component_divergence_forward(Context& context, Problem<T> problem, bool logarithms, const double* known, T* values,
                                  T* row_lse, double* self_overlaps);

// Gradients of sum_bi grad_values[b, i] values[b, i], to `known` in grad_known (batch), null: not wanted.
template <class T>
void component_divergence_backward(Context& context, Problem<T> problem, bool logarithms, const double* known,
                                   const T* grad_values, const T* row_lse, const double* self_overlaps,
                                   const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, double* grad_known);

// values[b, i, j] = log N(mu_i; nu_j, S_i + T_j); nothing is left out.
template <class T>
void pairwise_forward(Context& context, Problem<T> problem, T* values);

template <class T>
void pairwise_backward(Context& context, Problem<T> problem, const T* grad_values, const SideGradients<T>& grad_p,
                       const SideGradients<T>& grad_q);

// assignment[b, i] = argmax_j logit_ij, as torch.argmax.
template <class T>
void assign(Context& context, Problem<T> problem, int64_t* assignment);

// Full covariances, in float64 up to kMaxFullDim dimensions: the variances of both sides are covariances, (items, n,
// dim, dim), symmetric, and so are their gradients. Nothing is packed and nothing is left out of the values. A sum of
// two that is not positive definite makes its pair NaN. `self`: row_lse[b, i] = LSE over j >= i, where pairs j > i
// count twice; p and q are the same mixtures.
void full_overlap_lse_forward(Context& context, const Problem<double>& problem, bool self, double* row_lse);

// Gradients of sum_bi grad_row_lse[b, i] row_lse[b, i], without `self`. That to the log weights of p is the sum of the
// shares of its row.
void full_overlap_lse_backward(Context& context, const Problem<double>& problem, const double* grad_row_lse,
                               const double* row_lse, const SideGradients<double>& grad_p,
                               const SideGradients<double>& grad_q);

void full_pairwise_forward(Context& context, const Problem<double>& problem, double* values);

void full_pairwise_backward(Context& context, const Problem<double>& problem, const double* grad_values,
                            const SideGradients<double>& grad_p, const SideGradients<double>& grad_q);

void full_assign(Context& context, const Problem<double>& problem, int64_t* assignment);

}   // namespace csdiv::cuda
