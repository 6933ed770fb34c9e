// The arithmetic of points against a vector of columns that were factored once: docs/math.md, equation (17).
#pragma once

#include "full_tile.h"
#include "simd.h"

namespace csdiv::cpu::CSDIV_ISA {

// kRows points at a time, so that a number of the columns' is loaded once for them. kDim: as in full_pair.h.
template <int kDim, int kRows>
class PointGroup {
  static constexpr int kSize = kDim ? kDim : kMaxFullDim;
  static constexpr int64_t kStep = kLanes<double>;
  using Value = Vec<double>;

 public:
  PointGroup(const double* columns, int64_t dim) : columns_(columns), dim_(kDim ? kDim : int(dim)) {}

  // z = L^-1 delta; the logits go to logit(r).
  template <class Logit>
  CSDIV_INLINE void whiten(const double* points, const Logit& logit) {
    Value delta[kRows][kSize], quadratic[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < dim_; ++k) delta[r][k] = points[r * record_size(dim_) + k] - load(columns_ + k * kStep);
    }
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      Value z[kRows] = {};
#pragma GCC unroll 8
      for (int k = 0; k <= i; ++k)
        for (int r = 0; r < kRows; ++r) z[r] += inverse(i, k) * delta[r][k];
      for (int r = 0; r < kRows; ++r) {
        whitened_[r][i] = z[r];
        quadratic[r] += z[r] * z[r];
      }
    }
    const Value log_weight = load(columns_ + (record_size(dim_) - 1) * kStep);
    for (int r = 0; r < kRows; ++r)
      logit(r) = log_weight == -__builtin_inf() ? log_weight : log_weight - 0.5 * quadratic[r];
  }

  // Adds to the sums of w u of the points, u = C^-1 delta, and of w z, w z z' and w of the columns; null: not wanted.
  CSDIV_INLINE void add_gradients(const Value* weights, bool covariances, double* to_points, double* to_columns) {
    const int64_t size = record_size(dim_);
    Value weighted[kRows][kSize];
    for (int r = 0; r < kRows; ++r) {
      const IntVec<double> contributes = weights[r] != 0;   // then it does not matter what it multiplies
#pragma GCC unroll 8
      for (int i = 0; i < dim_; ++i) {
        whitened_[r][i] = contributes ? whitened_[r][i] : Value{};
        weighted[r][i] = weights[r] * whitened_[r][i];
      }
      if (to_points) add(to_points + (r * size + size - 1) * kStep, weights[r]);
    }
    if (to_points) {
#pragma GCC unroll 8
      for (int k = 0; k < dim_; ++k) {
        Value solved[kRows] = {};
#pragma GCC unroll 8
        for (int i = k; i < dim_; ++i)
          for (int r = 0; r < kRows; ++r) solved[r] += inverse(i, k) * weighted[r][i];
        for (int r = 0; r < kRows; ++r) add(to_points + (r * size + k) * kStep, solved[r]);
      }
    }
    if (!to_columns) return;
    add(to_columns + (size - 1) * kStep, sum_of_rows([&](int r) { return weights[r]; }));
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      add(to_columns + i * kStep, sum_of_rows([&](int r) { return weighted[r][i]; }));
      if (!covariances) continue;
#pragma GCC unroll 8
      for (int j = 0; j <= i; ++j)
        add(to_columns + (dim_ + triangle(i, j)) * kStep,
            sum_of_rows([&](int r) { return weighted[r][i] * whitened_[r][j]; }));
    }
  }

 private:
  CSDIV_INLINE Value inverse(int i, int k) const { return load(columns_ + (dim_ + triangle(i, k)) * kStep); }

  static CSDIV_INLINE void add(double* to, Value value) { store(to, load(to) + value); }

  template <class Term>
  static CSDIV_INLINE Value sum_of_rows(const Term& term) {
    Value sum = term(0);
    for (int r = 1; r < kRows; ++r) sum += term(r);
    return sum;
  }

  const double* columns_;
  const int dim_;
  Value whitened_[kRows][kSize];
};

// From sums of w z, w z z' and w to those of w u, w (u u' - C^-1) and w: u = L^-T z and C^-1 = L^-T L^-1.
inline void solve_sums(const double* columns, int dim, double* sums) {
  constexpr int64_t kStep = kLanes<double>;
  const auto inverse = [&](int i, int k) { return load(columns + (dim + triangle(i, k)) * kStep); };
  const auto slot = [&](int i, int k) { return sums + (dim + (i < k ? triangle(k, i) : triangle(i, k))) * kStep; };
  const Vec<double> weight = load(sums + (record_size(dim) - 1) * kStep);
  for (int i = 0; i < dim; ++i) {
    Vec<double> mean{};
    for (int k = i; k < dim; ++k) mean += inverse(k, i) * load(sums + k * kStep);
    store(sums + i * kStep, mean);
    store(slot(i, i), load(slot(i, i)) - weight);
  }
  Vec<double>
      product[kMaxFullDim];   // a column of (sum - w I) L^-1, below the diagonal; later ones need no earlier sums
  for (int j = 0; j < dim; ++j) {
    for (int k = j; k < dim; ++k) {
      product[k] = Vec<double>{};
      for (int l = j; l < dim; ++l) product[k] += load(slot(k, l)) * inverse(l, j);
    }
    for (int i = j; i < dim; ++i) {
      Vec<double> value{};
      for (int k = i; k < dim; ++k) value += inverse(k, i) * product[k];
      store(slot(i, j), value);
    }
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
