// The kernels for full covariances. CMake compiles this file once per instruction set.
#include <type_traits>

#include "full_pair.h"
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
      const Vec<double> weight = weights.log_normalizers
                                     ? row_weight<double>(logit, weights.log_normalizers[r], weights.grads[r])
                                     : given_weight(logit, load(weights.grads + (r * columns.blocks + block) * kStep));
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
  with_dim(rows.dim, [&](auto dim) { logits<dim()>(rows, columns, tile); });
}

void any_gradients(const FullRows& rows, const FullColumns& columns, const FullWeights& weights,
                   const FullGradients& grads) {
  with_dim(rows.dim, [&](auto dim) { gradients<dim()>(rows, columns, weights, grads); });
}

}   // namespace

FullKernels full_kernels() {
  return {kStep, any_logits, any_gradients};
}

}   // namespace csdiv::cpu::CSDIV_ISA
