// One log overlap of a tiny problem in each lane, with its gradients. Ranges are certified (pair.h); where a value
// comes out infinite or NaN, row_lse and gradients are not to be used.
#pragma once

#include "pair.h"
#include "tile.h"

namespace csdiv::cpu::CSDIV_ISA {

// log x of normal x > 0; NaN stays, so that it shows in the value.
template <class T>
inline Vec<T> log(Vec<T> x) {
  const Vec<T> result = log<T>(mantissa<T>(x), biased_exponent<T>(x) - (Float<T>::kBias - 1));
  return x == x ? result : x;
}

// Component i of p and j of q in dimension d.
template <class T>
struct TinyPair {
  Vec<T> delta, c;

  TinyPair(const TinyProblem<T>& problem, int64_t i, int64_t j, int64_t d)
      : delta(load(at(problem.p.means, problem.dim, i, d)) - load(at(problem.q.means, problem.dim, j, d))),
        c(load(at(problem.p.variances, problem.dim, i, d)) + load(at(problem.q.variances, problem.dim, j, d))) {}

  template <class Pointer>
  static Pointer at(Pointer array, int64_t dim, int64_t k, int64_t d) {
    return array + (k * dim + d) * kLanes<T>;
  }
};

template <class T>
CSDIV_INLINE void add_to(T* sum, Vec<T> value) {
  store(sum, load(sum) + value);
}

// Of a row: the sum of exp(logit) is exp(max) * total.
template <class T>
struct TinyRow {
  Vec<T> max, total;
};

// The logits of row i, without its own weight, become terms exp(logit - max).
template <class T>
inline TinyRow<T> tiny_row(const TinyProblem<T>& problem, int64_t i, IntVec<T> start) {
  const int64_t first = problem.self ? i : 0, m = problem.q.n;
  T* const terms = problem.terms + i * m * kLanes<T>;
  Vec<T> largest = broadcast<T>(-T(__builtin_inf())), total{};
  for (int64_t j = first; j < m; ++j) {
    PairSum<T> sum;
    sum.exponent = start;
    for (int64_t d = 0; d < problem.dim; ++d) {
      const TinyPair<T> pair(problem, i, j, d);
      sum.quadratic += pair.delta * pair.delta * fast_reciprocal<T>(pair.c);
      sum.multiply(pair.c);
    }
    const T twice = problem.self && j > i ? T(0.69314718055994530942) : T(0);
    const Vec<T> logit =
        load(problem.q.log_weights + j * kLanes<T>) - T(0.5) * (sum.quadratic + sum.log_determinant()) + twice;
    store(terms + j * kLanes<T>, logit);
    largest = maximum<T>(largest, logit);
  }
  const Vec<T> shift = largest > -T(__builtin_inf()) ? largest : Vec<T>{};   // a row without weight has terms of 0
  for (int64_t j = first; j < m; ++j) {
    const Vec<T> term = exp<T>(load(terms + j * kLanes<T>) - shift);
    store(terms + j * kLanes<T>, term);
    total += term;
  }
  return {largest, total};
}

// Adds the gradients of row i, whose terms times `scale` are its weights.
template <class T>
inline void tiny_gradients(const TinyProblem<T>& problem, int64_t i, Vec<T> scale) {
  const TinySide<T>&p = problem.p, &q = problem.q;
  const int64_t dim = problem.dim, first = problem.self ? i : 0, m = q.n;
  T* const weights = problem.terms + i * m * kLanes<T>;
  Vec<T> total{};
  for (int64_t j = first; j < m; ++j) {
    const Vec<T> weight = scale * load(weights + j * kLanes<T>);
    store(weights + j * kLanes<T>, weight);
    if (q.grad_means) add_to(q.grad_log_weights + j * kLanes<T>, weight);
    total += weight;
  }
  if (p.grad_means) add_to(p.grad_log_weights + i * kLanes<T>, total);
  for (int64_t d = 0; d < dim; ++d) {
    Vec<T> mean{}, variance{};
    for (int64_t j = first; j < m; ++j) {
      const TinyPair<T> pair(problem, i, j, d);
      const PairGradient<T> gradient = pair_gradient<true, T>(load(weights + j * kLanes<T>), pair.delta, pair.c);
      mean += gradient.mean;
      variance += gradient.variance;
      if (!q.grad_means) continue;
      add_to(TinyPair<T>::at(q.grad_means, dim, j, d), gradient.mean);
      add_to(TinyPair<T>::at(q.grad_variances, dim, j, d), T(0.5) * gradient.variance);
    }
    if (!p.grad_means) continue;
    add_to(TinyPair<T>::at(p.grad_means, dim, i, d), -mean);
    add_to(TinyPair<T>::at(p.grad_variances, dim, i, d), T(0.5) * variance);
  }
}

template <class T>
void tiny_overlap(const TinyProblem<T>& problem) {
  const int64_t n = problem.p.n;
  IntVec<T> start;
  for (int l = 0; l < kLanes<T>; ++l) start[l] = 1 - problem.scale_exponents[l] - problem.dim * (Float<T>::kBias - 1);
  Vec<T> maxima[kMaxTinyComponents], largest = broadcast<T>(-T(__builtin_inf()));
  for (int64_t i = 0; i < n; ++i) {
    const TinyRow<T> sums = tiny_row(problem, i, start);
    const Vec<T> row_lse = sums.max + log<T>(sums.total);
    maxima[i] = sums.max;
    store(problem.row_lse + i * kLanes<T>, row_lse);
    largest = maximum<T>(largest, load(problem.p.log_weights + i * kLanes<T>) + row_lse);
  }
  Vec<T> sum{};
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> log_weight = load(problem.p.log_weights + i * kLanes<T>);
    sum += exp<T>(log_weight + load(problem.row_lse + i * kLanes<T>) - largest);
  }
  store(problem.values, largest + log<T>(sum));
  if (!problem.p.grad_means && !problem.q.grad_means) return;
  for (int64_t i = 0; i < n; ++i) {
    const Vec<T> log_weight = load(problem.p.log_weights + i * kLanes<T>);
    tiny_gradients(problem, i, problem.factor * exp<T>(log_weight + maxima[i] - largest) / sum);
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
