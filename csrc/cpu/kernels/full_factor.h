// Columns that were given by a factor of their covariance, which is not multiplied out: docs/math.md, equation (17).
#pragma once

#include "full_tile.h"
#include "pair.h"

namespace csdiv::cpu::CSDIV_ISA {

// A block's L becomes L^-1, column by column, and log b becomes log b - log|2 pi L L'| / 2; NaN where L is singular.
inline void invert_factors(int dim, double* columns) {
  constexpr int64_t kStep = kLanes<double>;
  constexpr double kLog2Pi = 1.8378770664093454836, kMin = 0x1p-1022, kMax = 0x1.fffffffffffffp1023;
  const auto slot = [&](int i, int j) { return columns + (dim + triangle(i, j)) * kStep; };
  double* const log_weights = columns + (record_size(dim) - 1) * kStep;
  PairSum<double> determinant(0, dim);
  IntVec<double> valid = broadcast_int<double>(-1);
  Vec<double> reciprocals[kMaxFullDim];
  for (int i = 0; i < dim; ++i) {
    const Vec<double> pivot = load(slot(i, i)), size = pivot < 0 ? -pivot : pivot;
    valid &= (size >= kMin) & (size <= kMax);
    determinant.multiply(size);
    reciprocals[i] = 1.0 / pivot;
  }
  const Vec<double> log_weight = load(log_weights) - (determinant.log_determinant() + 0.5 * dim * kLog2Pi);
  store(log_weights, valid ? log_weight : broadcast<double>(__builtin_nan("")));
  for (int j = 0; j < dim; ++j) {
    for (int i = j + 1; i < dim; ++i) {
      Vec<double> sum = load(slot(i, j)) * reciprocals[j];
      for (int k = j + 1; k < i; ++k) sum += load(slot(i, k)) * load(slot(k, j));
      store(slot(i, j), -sum * reciprocals[i]);
    }
    store(slot(j, j), reciprocals[j]);
  }
}

// From a block's sums of w z, w z z' and w to those of w u and w L^-T (z z' - I), below and on the diagonal.
inline void factor_sums(const double* columns, int dim, double* sums) {
  constexpr int64_t kStep = kLanes<double>;
  const auto inverse = [&](int i, int k) { return load(columns + (dim + triangle(i, k)) * kStep); };
  const auto slot = [&](int i, int k) { return sums + (dim + triangle(i, k)) * kStep; };
  const Vec<double> weight = load(sums + (record_size(dim) - 1) * kStep);
  for (int i = 0; i < dim; ++i) {
    Vec<double> mean{};
    for (int k = i; k < dim; ++k) mean += inverse(k, i) * load(sums + k * kStep);
    store(sums + i * kStep, mean);
    store(slot(i, i), load(slot(i, i)) - weight);
  }
  for (int j = 0; j < dim; ++j) {
    for (int i = j; i < dim; ++i) {
      Vec<double> value{};
      for (int k = i; k < dim; ++k) value += inverse(k, i) * load(slot(k, j));
      store(slot(i, j), value);
    }
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
