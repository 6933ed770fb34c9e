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
  CSDIV_INLINE FullPair(const double* row, const double* columns, int dim)
      : row_(row), columns_(columns), dim_(kDim ? kDim : dim), sum_(0, dim_) {
    Value scaled[kSize];   // a row of L diag(d)
    IntVec<double> valid = broadcast_int<double>(-1);
#pragma GCC unroll 8
    for (int i = 0; i < dim_; ++i) {
      Value pivot = sum_of(dim_ + triangle(i, i));
      Value whitened = row_[i] - load(columns_ + i * kStep);
#pragma GCC unroll 8
      for (int j = 0; j < i; ++j) {
        Value value = sum_of(dim_ + triangle(i, j));
#pragma GCC unroll 8
        for (int k = 0; k < j; ++k) value -= scaled[k] * lower_[triangle(j, k)];
        scaled[j] = value;
        value *= lower_[triangle(j, j)];
        lower_[triangle(i, j)] = value;
        pivot -= value * scaled[j];
        whitened -= value * solved_[j];
      }
      valid &= (pivot >= kPivotMin) & (pivot <= kPivotMax);
      const Value reciprocal = 1.0 / pivot;
      lower_[triangle(i, i)] = reciprocal;
      solved_[i] = whitened;
      sum_.quadratic += whitened * whitened * reciprocal;
      sum_.multiply(pivot);
    }
    valid_ = valid;
  }

  CSDIV_INLINE Value logit() const {
    const Value log_weight = load(columns_ + (record_size(dim_) - 1) * kStep);
    const Value log_density = -0.5 * (sum_.quadratic + sum_.log_determinant() + dim_ * kLog2Pi);
    const Value logit = valid_ ? log_weight + log_density : broadcast<double>(__builtin_nan(""));
    return log_weight == -__builtin_inf() ? log_weight : logit;
  }

  // u = C^-1 delta, once.
  CSDIV_INLINE void solve() {
#pragma GCC unroll 8
    for (int i = dim_ - 1; i >= 0; --i) {
      Value value = solved_[i] * lower_[triangle(i, i)];
#pragma GCC unroll 8
      for (int k = i + 1; k < dim_; ++k) value -= lower_[triangle(k, i)] * solved_[k];
      solved_[i] = value;
    }
  }

  // C^-1 in the place of L, column by column from L' C^-1 = diag(d)^-1 L^-1, whose right side is lower triangular.
  CSDIV_INLINE void invert() {
    Value column[kSize];
#pragma GCC unroll 8
    for (int j = dim_ - 1; j >= 0; --j) {
#pragma GCC unroll 8
      for (int i = j + 1; i < dim_; ++i) column[i] = lower_[triangle(i, j)];
#pragma GCC unroll 8
      for (int i = j + 1; i < dim_; ++i) {
        Value value{};
#pragma GCC unroll 8
        for (int k = j + 1; k < i; ++k) value -= lower_[triangle(i, k)] * column[k];
#pragma GCC unroll 8
        for (int k = i; k < dim_; ++k) value -= lower_[triangle(k, i)] * column[k];
        lower_[triangle(i, j)] = value;
      }
      Value value = lower_[triangle(j, j)];
#pragma GCC unroll 8
      for (int k = j + 1; k < dim_; ++k) value -= lower_[triangle(k, j)] * column[k];
      lower_[triangle(j, j)] = value;
    }
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
        const Value share = mean * solved_[j] - weight * lower_[triangle(i, j)];
        add(dim_ + triangle(i, j), contributes ? share : Value{});
      }
    }
  }

 private:
  static constexpr double kPivotMin = 0x1p-1022, kPivotMax = 0x1.fffffffffffffp1023;
  static constexpr double kLog2Pi = 1.8378770664093454836;

  Value sum_of(int64_t k) const { return row_[k] + load(columns_ + k * kStep); }

  const double *row_, *columns_;
  const int dim_;
  PairSum<double> sum_;
  IntVec<double> valid_;
  Value lower_[triangle(kSize)];   // L below its diagonal, 1 / d on it
  Value solved_[kSize];            // L^-1 delta, then C^-1 delta
};

}   // namespace csdiv::cpu::CSDIV_ISA
