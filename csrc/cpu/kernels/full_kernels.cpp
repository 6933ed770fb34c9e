// The kernels for full covariances. CMake compiles this file once per instruction set.
#include <type_traits>

#include "full_factor.h"
#include "full_pair.h"
#include "full_points.h"
#include "tile_kernels.h"

namespace csdiv::cpu::CSDIV_ISA {
namespace {

constexpr int64_t kStep = kLanes<double>;

template <int kDim>
void logits(const FullRows& rows, const FullColumns& columns, double* tile) {
  const int64_t size = record_size(rows.dim);
  for (int64_t block = 0; block < columns.blocks; ++block) {
    FullPair<kDim> pair(columns.records + block * size * kStep, rows.dim);
    for (int64_t r = 0; r < rows.count; ++r) {
      if (r == 0 || !rows.one_covariance) pair.factor(rows.records + r * size);
      store(tile + (r * columns.blocks + block) * kStep, pair.whiten(rows.records + r * size));
    }
  }
}

// Where the logit is -inf a given weight is zero, where it is NaN so is the weight, unless it is zero.
CSDIV_INLINE Vec<double> given_weight(Vec<double> logit, Vec<double> given) {
  const IntVec<double> nothing = (given == 0) | (logit == -__builtin_inf());
  return nothing ? Vec<double>{} : logit == logit ? given : logit;
}

// Of row r, whose given weights are the vector at `given`.
CSDIV_INLINE Vec<double> pair_weight(Vec<double> logit, const FullWeights& weights, int64_t r, int64_t given) {
  return weights.log_normalizers ? row_weight<double>(logit, weights.log_normalizers[r], weights.grads[r])
                                 : given_weight(logit, load(weights.grads + given * kStep));
}

template <int kDim>
void gradients(const FullRows& rows, const FullColumns& columns, const FullWeights& weights,
               const FullGradients& grads) {
  const int64_t size = record_size(rows.dim);
  for (int64_t block = 0; block < columns.blocks; ++block) {
    FullPair<kDim> pair(columns.records + block * size * kStep, rows.dim);
    double* const to_columns = grads.columns ? grads.columns + block * size * kStep : nullptr;
    for (int64_t r = 0; r < rows.count; ++r) {
      if (r == 0 || !rows.one_covariance) pair.factor(rows.records + r * size);
      const Vec<double> logit = pair.whiten(rows.records + r * size);
      const Vec<double> weight = pair_weight(logit, weights, r, r * columns.blocks + block);
      if (!any<double>(weight != 0)) continue;
      pair.solve();
      if (grads.covariances) pair.invert();
      double* const to_row = grads.rows ? grads.rows + r * size * kStep : nullptr;
      pair.add_gradients(weight, grads.covariances, [&](int64_t k, Vec<double> share) {
        if (to_row) store(to_row + k * kStep, load(to_row + k * kStep) + share);
        if (to_columns) store(to_columns + k * kStep, load(to_columns + k * kStep) + share);
      });
    }
  }
}

template <int kDim>
void factor_columns(int64_t dim, int64_t blocks, double* records) {
  constexpr double kPoint[record_size(kMaxFullDim)] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    double* const columns = records + block * record_size(dim) * kStep;
    FullPair<kDim> pair(columns, dim);
    pair.factor(kPoint);
    pair.store_factor(columns);
  }
}

constexpr int64_t kGroup = 4;   // points whose differences from the columns, up to D = 3, are all in registers

template <int kDim, int kRows>
void point_logits(const FullRows& rows, const FullColumns& columns, int64_t block, int64_t first, double* tile) {
  const int64_t size = record_size(rows.dim);
  PointGroup<kDim, kRows> group(columns.records + block * size * kStep, rows.dim);
  Vec<double> logits[kRows];
  group.whiten(rows.records + first * size, [&](int r) -> Vec<double>& { return logits[r]; });
  for (int r = 0; r < kRows; ++r) store(tile + ((first + r) * columns.blocks + block) * kStep, logits[r]);
}

template <int kDim, int kRows>
void point_gradients(const FullRows& rows, const FullColumns& columns, const FullWeights& weights,
                     const FullGradients& grads, int64_t block, int64_t first) {
  const int64_t size = record_size(rows.dim);
  PointGroup<kDim, kRows> group(columns.records + block * size * kStep, rows.dim);
  Vec<double> values[kRows];   // logits, then weights
  group.whiten(rows.records + first * size, [&](int r) -> Vec<double>& { return values[r]; });
  IntVec<double> contributes{};
  for (int r = 0; r < kRows; ++r) {
    values[r] = pair_weight(values[r], weights, first + r, (first + r) * columns.blocks + block);
    contributes |= values[r] != 0;
  }
  if (!any<double>(contributes)) return;
  group.add_gradients(values, grads.covariances, grads.rows ? grads.rows + first * size * kStep : nullptr,
                      grads.columns ? grads.columns + block * size * kStep : nullptr);
}

// f(rows as a constant, block, first row) for every block and group of rows.
template <class F>
void for_each_group(int64_t rows, int64_t blocks, const F& f) {
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t first = 0;
    for (; first + kGroup <= rows; first += kGroup) f(std::integral_constant<int, kGroup>(), block, first);
    for (; first < rows; ++first) f(std::integral_constant<int, 1>(), block, first);
  }
}

// f(dim) with the dimension as a constant, where it is small, else with 0.
template <class F>
void with_dim(int64_t dim, const F& f) {
  switch (dim) {
#define CSDIV_CASE(d) \
  case d:             \
    return f(std::integral_constant<int, d>())
    CSDIV_CASE(1);
    CSDIV_CASE(2);
    CSDIV_CASE(3);
    CSDIV_CASE(4);
    CSDIV_CASE(5);
    CSDIV_CASE(6);
    CSDIV_CASE(7);
    CSDIV_CASE(8);
#undef CSDIV_CASE
    default:
      return f(std::integral_constant<int, 0>());
  }
}

void any_logits(const FullRows& rows, const FullColumns& columns, double* tile) {
  with_dim(rows.dim, [&](auto dim) {
    if (!columns.factored) return logits<dim()>(rows, columns, tile);
    for_each_group(rows.count, columns.blocks, [&](auto count, int64_t block, int64_t first) {
      point_logits<dim(), count()>(rows, columns, block, first, tile);
    });
  });
}

void any_gradients(const FullRows& rows, const FullColumns& columns, const FullWeights& weights,
                   const FullGradients& grads) {
  with_dim(rows.dim, [&](auto dim) {
    if (!columns.factored) return gradients<dim()>(rows, columns, weights, grads);
    for_each_group(rows.count, columns.blocks, [&](auto count, int64_t block, int64_t first) {
      point_gradients<dim(), count()>(rows, columns, weights, grads, block, first);
    });
  });
}

void any_factor_columns(int64_t dim, int64_t blocks, double* records) {
  with_dim(dim, [&](auto constant) { factor_columns<constant()>(dim, blocks, records); });
}

void any_invert_factors(int64_t dim, int64_t blocks, double* records) {
  for (int64_t block = 0; block < blocks; ++block) invert_factors(int(dim), records + block * record_size(dim) * kStep);
}

void any_solve_sums(int64_t dim, const FullColumns& columns, double* sums) {
  for (int64_t block = 0; block < columns.blocks; ++block) {
    const int64_t offset = block * record_size(dim) * kStep;
    const auto solve = columns.factors ? factor_sums : solve_sums;
    solve(columns.records + offset, int(dim), sums + offset);
  }
}

}   // namespace

FullKernels full_kernels() {
  return {kStep, any_factor_columns, any_invert_factors, any_logits, any_gradients, any_solve_sums};
}

}   // namespace csdiv::cpu::CSDIV_ISA
