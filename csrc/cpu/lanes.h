// Batches of tiny problems: a problem in each lane, its pairs one after the other. What the kernel reads and writes.
#pragma once

#include <cstdint>

namespace csdiv::cpu {

constexpr int64_t kMaxLaneComponents = 32;   // of either side; more fill vectors by themselves
constexpr int64_t kMaxLaneDim = 8;

// A side of as many problems as a vector has lanes. Arrays of gradients are added to; null: not wanted.
template <class T>
struct LaneSide {
  const T* means;         // (n, dim, lanes)
  const T* variances;     // (n, dim, lanes)
  const T* log_weights;   // (n, lanes)
  int64_t n;
  T* grad_means = nullptr;         // (n, dim, lanes), of the sum of factor * values; all three or none
  T* grad_variances = nullptr;     // (n, dim, lanes)
  T* grad_log_weights = nullptr;   // (n, lanes)
};

template <class T>
struct LaneProblem {
  LaneSide<T> p, q;
  int64_t dim;
  const int64_t* scale_exponents;   // (lanes) E
  bool self;                        // q is p: pairs j >= i, those with j > i twice
  T factor;
  T* terms;    // (p.n, q.n, lanes), scratch
  T* rows;     // (p.n, lanes), LSE_j logit_ij, over j >= i of a self term
  T* values;   // (lanes), LSE_i (log a_i + rows_i)
};

}   // namespace csdiv::cpu
