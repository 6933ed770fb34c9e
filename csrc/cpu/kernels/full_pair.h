// The arithmetic of one row against a vector of columns with full covariances: docs/math.md, equations (7) and (5).
#pragma once

#include "full_tile.h"
#include "pair.h"

namespace csdiv::cpu::CSDIV_ISA {

// C = S + T = L diag(d) L', L with a unit diagonal. kDim: the dimension, or 0 where it is known at run time alone.
template <int kDim>
class FullPair {
  static constexpr int kSize = kDim ? kDim : kMaxFullDim;
  static constexpr int64_t kStep = kLanes<double>;
  using Value = Vec<double>;

 public:
  FullPair(const double* columns, int64_t dim) : columns_(columns), dim_(kDim ? kDim : int(dim)) {
    for (int k = 0; k < triangle(kDim); ++k) inverse_[k] = Value{};   // compilers do not see that invert() comes first
  }

  // C with the row's covariance; whiten() is to follow.
  CSDIV_INLINE void factor(const double* row) {
    Value scaled[kSize];   // a row of L diag(d)
    inverted_ = false;
    valid_ = broadcast_int<double>(-1);
    PairSum<double> determinant(0, dim_);
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      Value pivot = sum_of(row, i, i);
#pragma GCC unroll 8
      for (int j = 0; j < i; ++j) {
        Value value = sum_of(row, i, j);
#pragma GCC unroll 8
        for (int k = 0; k < j; ++k) value -= scaled[k] * lower_[triangle(j, k)];
        scaled[j] = value;
        value *= lower_[triangle(j, j)];
        lower_[triangle(i, j)] = value;
        pivot -= value * scaled[j];
      }
      valid_ &= (pivot >= kPivotMin) & (pivot <= kPivotMax);
      lower_[triangle(i, i)] = 1.0 / pivot;
      determinant.multiply(pivot);
    }
    log_determinant_ = determinant.log_determinant() + dim_ * kLog2Pi;
  }

  // L^-1 delta of a row whose covariance was factored; returns the logit.
  CSDIV_INLINE Value whiten(const double* row) {
    Value quadratic{};
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      Value value = row[i] - load(columns_ + i * kStep);
#pragma GCC unroll 8
      for (int k = 0; k < i; ++k) value -= lower_[triangle(i, k)] * solved_[k];
      solved_[i] = value;
      quadratic += value * value * lower_[triangle(i, i)];
    }
    const Value log_weight = load(columns_ + (record_size(dim_) - 1) * kStep);
    const Value logit = log_weight - 0.5 * (quadratic + log_determinant_);
    return log_weight == -__builtin_inf() ? log_weight : valid_ ? logit : broadcast<double>(__builtin_nan(""));
  }

  // u = C^-1 delta, once after whiten().
  CSDIV_INLINE void solve() {
#pragma GCC unroll 8
    for (int i = dim_ - 1; i >= 0; --i) {
      Value value = solved_[i] * lower_[triangle(i, i)];
#pragma GCC unroll 8
      for (int k = i + 1; k < dim_; ++k) value -= lower_[triangle(k, i)] * solved_[k];
      solved_[i] = value;
    }
  }

  // C^-1, column by column from L' C^-1 = diag(d)^-1 L^-1, whose right side is lower triangular; once after factor().
  CSDIV_INLINE void invert() {
    if (inverted_) return;
    inverted_ = true;
#pragma GCC unroll 8
    for (int j = dim_ - 1; j >= 0; --j) {
#pragma GCC unroll 8
      for (int i = dim_ - 1; i >= j; --i) {
        Value value = i == j ? lower_[triangle(j, j)] : Value{};
#pragma GCC unroll 8
        for (int k = j + 1; k < i; ++k) value -= inverse_[triangle(i, k)] * lower_[triangle(k, j)];
#pragma GCC unroll 8
        for (int k = i > j ? i : j + 1; k < dim_; ++k) value -= inverse_[triangle(k, i)] * lower_[triangle(k, j)];
        inverse_[triangle(i, j)] = value;
      }
    }
  }

  // For pairs of points with these columns: L^-1 diag(d)^-1/2 and the logarithm in records of their form.
  CSDIV_INLINE void store_factor(double* records) {
    for (int i = 0; i < dim_; ++i) {
      Value root = valid_ ? lower_[triangle(i, i)] : Value{};
      for (int64_t lane = 0; lane < kStep; ++lane) root[lane] = __builtin_sqrt(root[lane]);
      for (int j = 0; j <= i; ++j) {
        Value value = i == j ? broadcast(1.0) : -lower_[triangle(i, j)];
        for (int k = j + 1; k < i; ++k) value -= lower_[triangle(i, k)] * inverse_[triangle(k, j)];
        inverse_[triangle(i, j)] = value;   // of L^-1
        store(records + (dim_ + triangle(i, j)) * kStep, valid_ ? value * root : Value{});
      }
    }
    double* const log_weights = records + (record_size(dim_) - 1) * kStep;
    const Value log_weight = load(log_weights) - 0.5 * log_determinant_;
    store(log_weights, valid_ ? log_weight : broadcast<double>(__builtin_nan("")));
  }

  // add(k, value) for the pair's share of each number k of a record; after solve() and, with covariances, invert().
  template <class Add>
  CSDIV_INLINE void add_gradients(Value weight, bool covariances, const Add& add) const {
    const IntVec<double> contributes = weight != 0;   // then it does not matter what it multiplies
    add(record_size(dim_) - 1, weight);
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      const Value mean = contributes ? weight * solved_[i] : Value{};
      add(i, mean);
      if (!covariances) continue;
#pragma GCC unroll 8
      for (int j = 0; j <= i; ++j) {
        const Value share = mean * solved_[j] - weight * inverse_[triangle(i, j)];
        add(dim_ + triangle(i, j), contributes ? share : Value{});
      }
    }
  }

 private:
  static constexpr double kPivotMin = 0x1p-1022, kPivotMax = 0x1.fffffffffffffp1023;
  static constexpr double kLog2Pi = 1.8378770664093454836;

  CSDIV_INLINE Value sum_of(const double* row, int i, int j) const {
    const int64_t k = dim_ + triangle(i, j);
    return row[k] + load(columns_ + k * kStep);
  }

  const double* columns_;
  const int dim_;
  bool inverted_ = false;
  IntVec<double> valid_;           // whether C is positive definite
  Value log_determinant_;          // of 2 pi C
  Value lower_[triangle(kSize)];   // L below its diagonal, 1 / d on it
  Value inverse_[triangle(kSize)];
  Value solved_[kSize];   // L^-1 delta, then C^-1 delta
};

}   // namespace csdiv::cpu::CSDIV_ISA
