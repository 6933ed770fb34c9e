// |x - y|^2 = |x - m|^2 + |y - m|^2 - 2 (x - m)(y - m): one instruction for an element, where delta^2 takes two.
// m is a center of the stripe's columns. It errs by about eps (|x - m|^2 + |y - m|^2) / 2c in the exponent, where the
// budget is at least 4 eps max(1, |x - y|^2 / 2c): pairs in which norms are larger than kProductFits times their
// max(2c, |x - y|^2), so that x - m and y - m are near to each other, do not take it, nor those beside them in a
// register tile.
#pragma once

#include "pair.h"

namespace csdiv::cpu::CSDIV_ISA {

constexpr int kProductVectors = 2;   // of columns in a register tile, each with two sums
constexpr int kProductFits = 2, kProductFitsOfFew = 3;
constexpr int64_t kFewDims = 64;   // below: sums of few terms are more exact, and of random means more are near

// Adds (x - m)(y - m) over dimensions [begin, end) of kRows rows of `centered` (kTerms apart) to the tile.
template <int kRows, int kVectors, class T>
CSDIV_INLINE void add_products(const T* centered, int64_t begin, int64_t end, const Stripe<T>& columns, int64_t column,
                               T* tile) {
  Vec<T> sums[2][kRows][kVectors] = {};   // of even and of odd dimensions
  const auto add = [&](int64_t d, Vec<T>(&to)[kRows][kVectors]) {
    Vec<T> means[kVectors];
    for (int v = 0; v < kVectors; ++v) means[v] = load(columns.centered + d * columns.stride + column + v * kLanes<T>);
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> mean = broadcast<T>(centered[r * kTerms + d - begin]);
      for (int v = 0; v < kVectors; ++v) to[r][v] += mean * means[v];
    }
  };
  int64_t d = begin;
  for (; d + 2 <= end; d += 2) {
    add(d, sums[0]);
    add(d + 1, sums[1]);
  }
  if (d < end) add(d, sums[0]);
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      T* const at = tile + r * columns.stride + column + v * kLanes<T>;
      const Vec<T> sum = sums[0][r][v] + sums[1][r][v];
      store(at, begin ? load(at) + sum : sum);
    }
  }
}

// All rows of the tile against kVectors vectors of columns, which stay in the cache meanwhile.
template <int kVectors, class T>
void add_product_columns(const T* centered, int64_t count, int64_t begin, int64_t end, const Stripe<T>& columns,
                         int64_t column, T* tile) {
  int64_t row = 0;
  for (; row + kRegisterRows <= count; row += kRegisterRows)
    add_products<kRegisterRows, kVectors>(centered + row * kTerms, begin, end, columns, column,
                                          tile + row * columns.stride);
  for (; row < count; ++row)
    add_products<1, kVectors>(centered + row * kTerms, begin, end, columns, column, tile + row * columns.stride);
}

// tile[r, j] = (x - m)(y - m) for j >= first_column, norms[r] = |x - m|^2.
template <class T>
void products(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first_column, T* tile, T* norms) {
  T centered[kTileRows * kTerms];
  for (int64_t r = 0; r < rows.count; ++r) norms[r] = 0;
  for (int64_t begin = 0; begin < rows.dim; begin += kTerms) {
    const int64_t count = rows.dim - begin < kTerms ? rows.dim - begin : kTerms;
    for (int64_t r = 0; r < rows.count; ++r) {
      const T* const means = rows.means + r * rows.dim + begin;
      T* const to = centered + r * kTerms;
      Vec<T> norm{};
      int64_t d = 0;
      for (; d + kLanes<T> <= count; d += kLanes<T>) {
        const Vec<T> mean = load(means + d) - load(columns.center + begin + d);
        store(to + d, mean);
        norm += mean * mean;
      }
      norms[r] += sum<T>(norm);
      for (; d < count; ++d) {
        to[d] = means[d] - columns.center[begin + d];
        norms[r] += to[d] * to[d];
      }
    }
    constexpr int64_t kStep = kProductVectors * kLanes<T>;
    int64_t column = first_column;
    for (; column + kStep <= columns.padded; column += kStep)
      add_product_columns<kProductVectors>(centered, rows.count, begin, begin + count, columns, column, tile);
    for (; column < columns.padded; column += kLanes<T>)
      add_product_columns<1>(centered, rows.count, begin, begin + count, columns, column, tile);
  }
}

// |x - y|^2 of kRows rows and a vector of columns, from what `products` left in their tile; false: not exact enough.
template <int kRows, class T>
CSDIV_INLINE bool squares_of_products(int64_t dim, const T* variances, const T* norms, const Stripe<T>& columns,
                                      int64_t column, const T* tile, Vec<T> (&squares)[kRows][1]) {
  const Vec<T> column_norms = load(columns.norms + column), column_variances = load(columns.variances + column);
  const T fits = dim < kFewDims ? kProductFitsOfFew : kProductFits;
  IntVec<T> wrong{};
  for (int r = 0; r < kRows; ++r) {
    const Vec<T> sum_of_norms = norms[r] + column_norms, c = variances[r] + column_variances;
    squares[r][0] = sum_of_norms - 2 * load(tile + r * columns.stride + column);
    wrong |= sum_of_norms > fits * maximum<T>(2 * c, squares[r][0]);
  }
  return !any<T>(wrong);
}

}   // namespace csdiv::cpu::CSDIV_ISA
