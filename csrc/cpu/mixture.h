// What the entry points are given: batches of mixtures, and the problems that pair them.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/system/thread_pool.h"
#include "instantiate.h"

namespace csdiv::cpu {

constexpr double kLog2 = 0.69314718055994530942;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A component of weight zero counts nothing, whatever its parameters and its row. NaN does, to show.
template <class T>
bool counts(T log_weight) {
  return log_weight != -INFINITY;
}

// Mixtures of n components, read where the caller has them.
template <class T>
struct Mixture {
  const T* means;                   // (batch, n, dim)
  const T* variances;               // (batch, n, dim)
  const T* log_weights;             // (batch, n); null: all 0
  const int64_t* scale_exponents;   // (batch), even; with an exponent_period one for each period
  const int64_t* index;             // the item that each problem uses; null: its own, or the only one
  int64_t batch;
  int64_t n;
  bool same_dims = false;                // each component has one variance, in all dimensions
  bool same_components = false;          // all components of all items have the same variances
  int64_t exponent_period = 0;           // components, of all items, per scale exponent; 0: one exponent for each item
  const T* precisions = nullptr;         // (batch, n, dim) and
  const T* log_determinants = nullptr;   // (batch, n): of rows in the form kTiedColumns, see tile.h

  int64_t item(int64_t problem) const { return index ? index[problem] : batch == 1 ? 0 : problem; }

  // An infinite weight is none: NaN.
  T log_weight(int64_t item, int64_t k) const {
    const T log_weight = log_weights ? log_weights[item * n + k] : T(0);
    return log_weight == INFINITY ? T(NAN) : log_weight;
  }

  int64_t scale_exponent(int64_t item, int64_t k) const {
    return scale_exponents[exponent_period ? (item * n + k) / exponent_period : item];
  }
};

// Rows p against columns q, `batch` times.
template <class T>
struct Problem {
  int64_t batch;
  int64_t dim;
  Mixture<T> p;
  Mixture<T> q;
  bool q_factors = false;   // of full covariances: q's are lower triangular factors, and p has points

  int64_t rows() const { return batch * p.n; }
};

// A batch of p against one q is one problem with batch * n rows; every output keeps its layout.
template <class T>
Problem<T> flattened(Problem<T> problem) {
  Mixture<T>& p = problem.p;
  if (problem.batch > 1 && p.batch == problem.batch && !p.index && problem.q.batch == 1 && !problem.q.index) {
    if (!p.exponent_period) p.exponent_period = p.n;
    p.n *= p.batch;
    p.batch = problem.batch = 1;
  }
  return problem;
}

// Threads cost more than they bring to a small problem.
template <class T>
int useful_threads(const Problem<T>& problem, int threads) {
  if (threads == 1) return 1;
  const double elements = double(problem.batch) * problem.p.n * problem.q.n * problem.dim;
  return elements < worthwhile_elements() ? 1 : threads;
}

}   // namespace csdiv::cpu
