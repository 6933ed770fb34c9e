// The pair term where variances have a structure (tile.h, Form). Tiles are certified as for the fast form of pair.h.
//   kSpherical: one c for all dimensions, so that log|c| = D log c; a reciprocal and a logarithm for a pair.
//   kTiedRows, kTiedColumns: 1 / c and log|c| were found beforehand, for every column or for every row.
//   kSphericalTiedRows: both.
// Distances of spherical components come from squares.h where they may, else they are sums of delta^2.
#pragma once

#include "pair.h"
#include "squares.h"

namespace csdiv::cpu::CSDIV_ISA {

// Columns of a register tile, in vectors: a delta takes two or three instructions, so loads are shared, and eight sums
// hide what an addition waits for.
constexpr int kRegisterVectors = kVectorBytes == 64 ? 2 : 4;

constexpr bool is_spherical(Form form) {
  return form == Form::kSpherical || form == Form::kSphericalTiedRows;
}

// sum_d delta^2, times 1 / c unless spherical, of kRows rows against kVectors vectors of columns; over dimensions
// [first, last), at most kTerms^2.
template <Form kForm, int kRows, int kVectors, class T>
CSDIV_INLINE void quadratic_forms(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, int64_t column,
                                  int64_t first, int64_t last, Vec<T> (&quadratic)[kRows][kVectors]) {
  const int64_t dim = rows.dim, stride = columns.stride;
  const T* const row_means = rows.means + row * dim;
  const T* const row_precisions = kForm == Form::kTiedColumns ? rows.precisions + row * dim : nullptr;
  const T* const column_means = columns.means + column;
  const T* const column_precisions = kForm == Form::kTiedRows ? columns.precisions + column : nullptr;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) quadratic[r][v] = Vec<T>{};
  for (int64_t begin = first; begin < last; begin += kTerms) {
    const int64_t end = begin + kTerms < last ? begin + kTerms : last;
    Vec<T> sums[kRows][kVectors] = {};
    for (int64_t d = begin; d < end; ++d) {
      Vec<T> means[kVectors], precisions[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        means[v] = load(column_means + d * stride + v * kLanes<T>);
        if constexpr (kForm == Form::kTiedRows) precisions[v] = load(column_precisions + d * stride + v * kLanes<T>);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> mean = broadcast<T>(row_means[r * dim + d]);
        for (int v = 0; v < kVectors; ++v) {
          const Vec<T> delta = mean - means[v];
          if constexpr (is_spherical(kForm)) sums[r][v] += delta * delta;
          if constexpr (kForm == Form::kTiedRows) sums[r][v] += delta * delta * precisions[v];
          if constexpr (kForm == Form::kTiedColumns) sums[r][v] += delta * delta * row_precisions[r * dim + d];
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) quadratic[r][v] += sums[r][v];
  }
}

// The same over dimensions from kTerms^2 on, added; seldom needed.
template <Form kForm, int kRows, int kVectors, class T>
[[gnu::noinline]] void add_more_dims(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, int64_t column,
                                     Vec<T> (&quadratic)[kRows][kVectors]) {
  constexpr int64_t kDims = kTerms * kTerms;
  for (int64_t begin = kDims; begin < rows.dim; begin += kDims) {
    Vec<T> sums[kRows][kVectors];
    const int64_t end = begin + kDims < rows.dim ? begin + kDims : rows.dim;
    quadratic_forms<kForm>(rows, row, columns, column, begin, end, sums);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) quadratic[r][v] += sums[r][v];
  }
}

// The same over all dimensions.
template <Form kForm, int kRows, int kVectors, class T>
CSDIV_INLINE void quadratic_forms(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, int64_t column,
                                  Vec<T> (&quadratic)[kRows][kVectors]) {
  constexpr int64_t kDims = kTerms * kTerms;
  quadratic_forms<kForm>(rows, row, columns, column, 0, rows.dim < kDims ? rows.dim : kDims, quadratic);
  if (rows.dim <= kDims) return;
  Vec<T> totals[kRows][kVectors];   // a copy: `quadratic` itself stays in registers
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) totals[r][v] = quadratic[r][v];
  add_more_dims<kForm>(rows, row, columns, column, totals);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) quadratic[r][v] = totals[r][v];
}

// c = s + t, which all dimensions have, and what rounding took from it: D log c magnifies that.
template <class T>
struct SphericalVariance {
  Vec<T> c, error, reciprocal;

  SphericalVariance(T s, Vec<T> t) : c(s + t) {
    const Vec<T> larger = maximum<T>(broadcast<T>(s), t), smaller = minimum<T>(broadcast<T>(s), t);
    error = smaller - (c - larger);
    reciprocal = fast_reciprocal<T>(c);
  }

  // quadratic / (c + error)
  Vec<T> divide(Vec<T> quadratic) const {
    const Vec<T> quotient = quadratic * reciprocal;
    return quotient + (quadratic - quotient * c - quotient * error) * reciprocal;
  }

  // dim log(c + error) - exponent log 2. Equation (8): the large parts cancel before anything is rounded.
  Vec<T> log_determinant(T dim, T exponent) const {
    using F = Float<T>;
    const SplitLog<T> log = split_log<T>(c, error * reciprocal);
    const Vec<T> e = log.exponent * dim - exponent;
    return (e * F::kLn2High + dim * log.high) + (e * F::kLn2Low + dim * log.low);
  }
};

// What spherical rows have, where stores to a tile cannot reach it.
template <int kRows, class T>
struct SphericalRows {
  T variances[kRows], exponents[kRows], dim;

  SphericalRows(const RowTile<T>& rows, int64_t row) : dim(T(rows.dim)) {
    for (int r = 0; r < kRows; ++r) {
      variances[r] = rows.variances[(row + r) * rows.dim];
      exponents[r] = T(rows.exponents[row + r]);
    }
  }
};

template <Form kForm, int kRows, int kVectors, class T>
CSDIV_INLINE void store_logits(const RowTile<T>& rows, int64_t row, const SphericalRows<kRows, T>& spherical,
                               const Stripe<T>& columns, int64_t column, const Vec<T> (&quadratic)[kRows][kVectors],
                               T* tile) {
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t j = column + v * kLanes<T>;
      Vec<T> logits;
      if constexpr (kForm == Form::kSpherical) {
        const SphericalVariance<T> variance(spherical.variances[r], load(columns.variances + j));
        logits =
            load(columns.log_weights + j) - T(0.5) * (variance.divide(quadratic[r][v]) +
                                                      variance.log_determinant(spherical.dim, spherical.exponents[r]));
      } else if constexpr (kForm == Form::kSphericalTiedRows) {
        logits = load(columns.log_scales + j) - T(0.5) * quadratic[r][v] * load(columns.precisions + j);
      } else if constexpr (kForm == Form::kTiedRows) {
        logits = load(columns.log_scales + j) - T(0.5) * quadratic[r][v];
      } else {
        logits = load(columns.log_weights + j) - T(0.5) * (quadratic[r][v] + rows.log_determinants[row + r]);
      }
      store(tile + (row + r) * columns.stride + j, logits);
    }
  }
}

// From what `products` left in the tile.
template <Form kForm, int kRows, class T>
void logits_of_products(const RowTile<T>& rows, int64_t row, Stripe<T> columns, int64_t first_column, const T* norms,
                        T* tile) {
  const SphericalRows<kRows, T> spherical(rows, row);
  T row_norms[kRows];
  for (int r = 0; r < kRows; ++r) row_norms[r] = norms[row + r];
  for (int64_t column = first_column; column < columns.padded; column += kLanes<T>) {
    Vec<T> squares[kRows][1];
    if (!squares_of_products(rows.dim, spherical.variances, row_norms, columns, column, tile + row * columns.stride,
                             squares))
      quadratic_forms<kForm>(rows, row, columns, column, squares);
    store_logits<kForm>(rows, row, spherical, columns, column, squares, tile);
  }
}

template <Form kForm, int kRows, int kVectors, class T>
CSDIV_INLINE void structured_logits_rows(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, int64_t column,
                                         T* tile) {
  Vec<T> quadratic[kRows][kVectors];
  quadratic_forms<kForm>(rows, row, columns, column, quadratic);
  store_logits<kForm>(rows, row, SphericalRows<kRows, T>(rows, row), columns, column, quadratic, tile);
}

template <Form kForm, int kVectors, class T>
void structured_logits_columns(const RowTile<T>& rows, const Stripe<T>& columns, int64_t column, T* tile) {
  int64_t row = 0;
  for (; row + kRegisterRows <= rows.count; row += kRegisterRows)
    structured_logits_rows<kForm, kRegisterRows, kVectors>(rows, row, columns, column, tile);
  for (; row < rows.count; ++row) structured_logits_rows<kForm, 1, kVectors>(rows, row, columns, column, tile);
}

template <Form kForm, class T>
void structured_logits(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first_column, T* tile) {
  if constexpr (is_spherical(kForm)) {
    if (columns.centered) {
      T norms[kTileRows];
      products(rows, columns, first_column, tile, norms);
      int64_t row = 0;
      for (; row + kRegisterRows <= rows.count; row += kRegisterRows)
        logits_of_products<kForm, kRegisterRows>(rows, row, columns, first_column, norms, tile);
      for (; row < rows.count; ++row) logits_of_products<kForm, 1>(rows, row, columns, first_column, norms, tile);
      return;
    }
  }
  constexpr int64_t kStep = kRegisterVectors * kLanes<T>;
  int64_t column = first_column;
  for (; column + kStep <= columns.padded; column += kStep)
    structured_logits_columns<kForm, kRegisterVectors>(rows, columns, column, tile);
  for (; column < columns.padded; column += kLanes<T>) structured_logits_columns<kForm, 1>(rows, columns, column, tile);
}

// Spherical: v = w / c in place of the weights; and the sums for the variances, w (sum_d delta^2 / c^2 - D / c), which
// take the place of dimension 0.
template <bool kRowGrads, bool kColumnGrads, int kRows, class T>
void spherical_variances(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, const T* products,
                         const T* norms, T* weights, const TileGradients<T>& grads) {
  const SphericalRows<kRows, T> spherical(rows, row);
  Vec<T> row_sums[kRows] = {};
  for (int64_t j = grads.first_column; j < columns.padded; j += kLanes<T>) {
    Vec<T> quadratic[kRows][1] = {}, column_sum{};
    if (grads.variances_wanted &&
        !(columns.centered && squares_of_products(rows.dim, spherical.variances, norms + row, columns, j,
                                                  products + row * columns.stride, quadratic)))
      quadratic_forms<Form::kSpherical>(rows, row, columns, j, quadratic);
    for (int r = 0; r < kRows; ++r) {
      T* const at = weights + (row + r) * columns.stride + j;
      const SphericalVariance<T> variance(spherical.variances[r], load(columns.variances + j));
      const Vec<T> v = load(at) * variance.reciprocal;
      store(at, v);
      if (!grads.variances_wanted) continue;
      const Vec<T> share = v * (variance.divide(quadratic[r][0]) - spherical.dim);
      row_sums[r] += share;
      column_sum += share;
    }
    if constexpr (kColumnGrads)
      if (grads.variances_wanted) store(grads.column_variances + j, load(grads.column_variances + j) + column_sum);
  }
  if constexpr (kRowGrads)
    for (int r = 0; r < kRows; ++r) grads.row_variances[(row + r) * rows.dim] += sum<T>(row_sums[r]);
}

// Dimension d of kRows rows against the whole stripe; `weights` are w / c.
template <bool kRowGrads, bool kColumnGrads, int kRows, class T>
void spherical_means(const RowTile<T>& rows, int64_t row, int64_t d, const Stripe<T>& columns, const T* weights,
                     const TileGradients<T>& grads, RowBlock<T>& block) {
  const T* const means = columns.means + d * columns.stride;
  T* const grad_means = kColumnGrads ? grads.column_means + d * columns.stride : nullptr;
  Vec<T> row_mean[kRows], row_sums[kRows] = {};
  for (int r = 0; r < kRows; ++r) row_mean[r] = broadcast<T>(rows.means[(row + r) * rows.dim + d]);
  for (int64_t j = grads.first_column; j < columns.padded; j += kLanes<T>) {
    const Vec<T> mean = load(means + j);
    Vec<T> column_sum{};
    if constexpr (kColumnGrads) column_sum = load(grad_means + j);
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> delta = row_mean[r] - mean, weight = load(weights + (row + r) * columns.stride + j);
      if constexpr (kRowGrads) row_sums[r] += weight * delta;
      if constexpr (kColumnGrads) column_sum += weight * delta;
    }
    if constexpr (kColumnGrads) store(grad_means + j, column_sum);
  }
  if constexpr (kRowGrads) block.set_means(row, d, row_sums);
}

template <bool kRowGrads, bool kColumnGrads, class T>
void spherical_gradients(const RowTile<T>& rows, const Stripe<T>& columns, T* weights, uint32_t active_rows,
                         const TileGradients<T>& grads) {
  T tile[kTileRows * kMaxStride], norms[kTileRows];
  if (columns.centered && grads.variances_wanted) products(rows, columns, grads.first_column, tile, norms);
  for_active_rows(rows.count, active_rows, [&](int64_t row, auto count) {
    spherical_variances<kRowGrads, kColumnGrads, count>(rows, row, columns, tile, norms, weights, grads);
  });
  for_row_blocks<kRowGrads>(rows, grads, false, [&](int64_t d, RowBlock<T>& block) {
    for_active_rows(rows.count, active_rows, [&](int64_t row, auto count) {
      spherical_means<kRowGrads, kColumnGrads, count>(rows, row, d, columns, weights, grads, block);
    });
  });
}

// 1 / c of every dimension and log|c|, for one vector of components, whose sum has begun; `c` gives their c.
template <class T, class C, class Store>
CSDIV_INLINE Vec<T> precisions(PairSum<T> sum, int64_t dim, const C& c, const Store& store_precision) {
  for (int64_t d = 0; d < dim; ++d) {
    const Vec<T> variance = c(d);
    store_precision(d, T(1) / variance);
    sum.multiply(variance);
  }
  return sum.log_determinant();
}

template <class T>
void column_precisions(const T* row_variances, int64_t dim, int64_t exponent, const Stripe<T>& columns, T* to,
                       T* log_scales) {
  for (int64_t j = 0; j < columns.padded; j += kLanes<T>) {
    if (columns.form == Form::kSphericalTiedRows) {
      const SphericalVariance<T> variance(row_variances[0], load(columns.variances + j));
      store(to + j, variance.divide(broadcast<T>(1)));
      store(log_scales + j, load(columns.log_weights + j) - T(0.5) * variance.log_determinant(dim, exponent));
      continue;
    }
    const Vec<T> log_determinant = precisions<T>(
        PairSum<T>(exponent, dim), dim,
        [&](int64_t d) { return row_variances[d] + load(columns.variances + d * columns.stride + j); },
        [&](int64_t d, Vec<T> precision) { store(to + d * columns.stride + j, precision); });
    store(log_scales + j, load(columns.log_weights + j) - T(0.5) * log_determinant);
  }
}

template <class T>
void row_precisions(const RowTile<T>& rows, const T* column_variances, T* to, T* log_determinants) {
  for (int64_t row = 0; row < rows.count; row += kLanes<T>) {
    const int count = int(rows.count - row < kLanes<T> ? rows.count - row : kLanes<T>);
    PairSum<T> sum(0, rows.dim);
    for (int k = 0; k < count; ++k) sum.exponent[k] -= rows.exponents[row + k];
    const Vec<T> log_determinant = precisions<T>(
        sum, rows.dim,
        [&](int64_t d) {
          Vec<T> c = broadcast<T>(1);
          for (int k = 0; k < count; ++k) c[k] = rows.variances[(row + k) * rows.dim + d] + column_variances[d];
          return c;
        },
        [&](int64_t d, Vec<T> precision) {
          for (int k = 0; k < count; ++k) to[(row + k) * rows.dim + d] = precision[k];
        });
    for (int k = 0; k < count; ++k) log_determinants[row + k] = log_determinant[k];
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
