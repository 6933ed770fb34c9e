// Full covariances: the interface between the drivers and the kernels, as in tile.h. All of it is float64.
//
// A component is a record of numbers: dim means, the dim (dim + 1) / 2 of its covariance's lower triangle row by row,
// and one for its weight. Sums over pairs for its gradients have the same form. Columns come in blocks of `lanes`
// components, each number of the record of all of them side by side.
#pragma once

#include <cstdint>

namespace csdiv::cpu {

constexpr int64_t kMaxFullDim = 32;   // a factor is on the stack
constexpr int64_t kFullRows = 16;     // of a tile: a block of columns is read from the nearest cache for all of them

constexpr int64_t triangle(int64_t i, int64_t j = 0) {
  return i * (i + 1) / 2 + j;
}

constexpr int64_t record_size(int64_t dim) {
  return dim + triangle(dim) + 1;
}

// Up to kFullRows components of p.
struct FullRows {
  const double* records;   // (count, record_size)
  int64_t count;
  int64_t dim;
  bool one_covariance;   // they have the same, as points and tied ones do: each sum with a column's is factored once
};

// Components of q in whole blocks. Those that fill the last one have log weight -inf, mean 0 and the identity.
struct FullColumns {
  const double* records;   // (blocks, record_size, lanes)
  int64_t blocks;
  bool factored;   // by factor_columns() or invert_factors(): the rows are points, whose covariances are not read
  bool factors;    // by invert_factors()
};

// The weights of a tile's pairs: grad_ri exp(logit - log_normalizer_r), or, where there is no normalizer, given ones.
struct FullWeights {
  const double* log_normalizers;   // (count)
  const double* grads;             // (count), or (count, blocks * lanes)
};

// Sums of w u, w (u u' - C^-1) and w, where u = C^-1 delta, to be added to; null: not wanted.
struct FullGradients {
  double* rows;       // (count, record_size, lanes), of which the lanes are to be added up
  double* columns;    // (blocks, record_size, lanes)
  bool covariances;   // false: w u and w alone
};

struct FullKernels {
  int64_t lanes;
  // In records of columns, C = L L' becomes L^-1 and log b becomes log b - log|2 pi C| / 2, NaN where C is not positive
  // definite.
  void (*factor_columns)(int64_t dim, int64_t blocks, double* records);
  // In records that have L in place of C, L becomes L^-1 and log b as above, NaN where L is singular.
  void (*invert_factors)(int64_t dim, int64_t blocks, double* records);
  // tile[r, j] = log b_j + log N(mu_r; nu_j, S_r + T_j), (count, blocks * lanes); NaN where the sum is not positive
  // definite.
  void (*logits)(const FullRows& rows, const FullColumns& columns, double* tile);
  void (*gradients)(const FullRows& rows, const FullColumns& columns, const FullWeights& weights,
                    const FullGradients& grads);
  // Of factored columns gradients() adds up w z, w z z' and w, z = L^-1 delta: this makes of them the sums above, and
  // of given factors the lower triangle of w L^-T (z z' - I) in place of w (u u' - C^-1).
  void (*solve_sums)(int64_t dim, const FullColumns& columns, double* sums);
};

}   // namespace csdiv::cpu
