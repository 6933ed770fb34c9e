// The entry points of the CPU backend; bindings.cpp describes and checks their arguments.
// Logits and values are relative to E: log 2 (sum_d log2 c - E) / 2 stands for the log determinant.
#pragma once

#include "mixture.h"

namespace csdiv::cpu {

// Each null: not wanted. Every other one is overwritten.
template <class T>
struct SideGradients {
  T* means = nullptr;         // (batch, n, dim) of the side
  T* variances = nullptr;     // (batch, n, dim)
  T* log_weights = nullptr;   // (batch, n)
};

// rows[b, i] = LSE_j logit_ij.
template <class T>
void overlap_lse_forward(const Problem<T>& problem, T* rows, int threads);

// Gradients of sum_bi grad_rows[b, i] rows[b, i]; grad_p.log_weights is not offered.
template <class T>
void overlap_lse_backward(const Problem<T>& problem, const T* rows, const T* grad_rows, const SideGradients<T>& grad_p,
                          const SideGradients<T>& grad_q, int threads);

// values[b] = log sum_ij a_i a_j exp(logit_ij without weights).
template <class T>
void self_overlap_forward(int64_t dim, const Mixture<T>& p, double* values, int threads);

template <class T>
void self_overlap_backward(int64_t dim, const Mixture<T>& p, const double* values, const T* grad_values,
                           const SideGradients<T>& grad, int threads);

// logits[b, i, j], without weights.
template <class T>
void pairwise_forward(const Problem<T>& problem, T* logits, int threads);

template <class T>
void pairwise_backward(const Problem<T>& problem, const T* grad_logits, const SideGradients<T>& grad_p,
                       const SideGradients<T>& grad_q, int threads);

// assignment[b, i] = argmax_j logit_ij, as torch.argmax.
template <class T>
void assign(const Problem<T>& problem, int64_t* assignment, int threads);

}  // namespace csdiv::cpu
