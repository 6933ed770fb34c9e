// The arithmetic of one tile (a RowTile against a Stripe). CMake compiles this file once per instruction set.
#include "tile_kernels.h"

#include <type_traits>

#include "pair.h"
#include "simd.h"
#include "structured_pair.h"
#include "sums.h"
#include "tiny.h"
#include "transpose.h"

namespace csdiv::cpu::CSDIV_ISA {
namespace {

template <class T>
void exponentials(const T* from, int64_t size, T cap, T* to) {
  int64_t k = 0;
  for (; k + kLanes<T> <= size; k += kLanes<T>) store(to + k, exp<T>(minimum<T>(broadcast<T>(cap), load(from + k))));
  if (k == size) return;
  T rest[kLanes<T>] = {};
  __builtin_memcpy(rest, from + k, (size - k) * sizeof(T));
  const Vec<T> last = exp<T>(minimum<T>(broadcast<T>(cap), load(rest)));
  __builtin_memcpy(to + k, &last, (size - k) * sizeof(T));
}

// Dimensions [begin, end) of kRows rows against one vector of columns.
template <bool kFast, int kRows, class T, class Sum>
CSDIV_INLINE void add_dims(const PairTerms<T>& terms, int64_t begin, int64_t end, Sum (&sums)[kRows]) {
  int64_t d = begin;
  if constexpr (kFast) {
    for (; d + kGroup <= end; d += kGroup) add_group<kGroup>(terms, d, sums);
    if (end - d == 1) add_group<1>(terms, d, sums);
    if (end - d == 2) add_group<2>(terms, d, sums);
    if (end - d == 3) add_group<3>(terms, d, sums);
  } else {
    for (; d < end; ++d)
      for (int r = 0; r < kRows; ++r) sums[r].add(terms.delta(r, d), terms.c(r, d));
  }
}

// The same over all dimensions from `begin` on: blocks of them, then kTerms blocks at a time.
template <bool kFast, int kRows, class T, class Sum>
CSDIV_INLINE void add_blocks(const PairTerms<T>& terms, int64_t begin, int64_t dim, Sum (&sums)[kRows]) {
  constexpr int64_t kBlock = kFast ? kTerms * kGroup : kTerms;
  Vec<T> quadratic[kRows], totals[kRows];
  for (int r = 0; r < kRows; ++r) {
    quadratic[r] = sums[r].quadratic;
    totals[r] = sums[r].quadratic = Vec<T>{};
  }
  for (; begin < dim; begin += kBlock) {
    const int64_t end = begin + kBlock < dim ? begin + kBlock : dim;
    add_dims<kFast, kRows>(terms, begin, end, sums);
    for (int r = 0; r < kRows; ++r) {
      quadratic[r] += sums[r].quadratic;
      sums[r].quadratic = Vec<T>{};
    }
    if (end % (kTerms * kBlock) != 0) continue;
    for (int r = 0; r < kRows; ++r) {
      totals[r] += quadratic[r];
      quadratic[r] = Vec<T>{};
    }
  }
  for (int r = 0; r < kRows; ++r) sums[r].quadratic = totals[r] + quadratic[r];
}

template <bool kFast, int kRows, class T, class Sum>
[[gnu::noinline]] void add_more_blocks(const PairTerms<T>& terms, int64_t begin, int64_t dim, Sum (&sums)[kRows]) {
  add_blocks<kFast, kRows>(terms, begin, dim, sums);
}

template <bool kFast, int kRows, class T>
CSDIV_INLINE void logits_rows(const RowTile<T>& rows, int64_t row, const Stripe<T>& columns, int64_t column, T* tile) {
  using Sum = std::conditional_t<kFast, PairSum<T>, ExactPairSum<T>>;
  const int64_t dim = rows.dim, factors = kFast ? (dim + kGroup - 1) / kGroup : dim;
  const PairTerms<T> terms{rows.means + row * dim, rows.variances + row * dim, dim,
                           columns.means + column, columns.variances + column, columns.stride};
  Sum sums[kRows];
  for (int r = 0; r < kRows; ++r) sums[r] = Sum(rows.exponents[row + r], factors);
  constexpr int64_t kBlock = kFast ? kTerms * kGroup : kTerms;
  if constexpr (kVectorBytes < 64) {   // with 16 registers no sums outlive the loops
    add_blocks<kFast, kRows>(terms, 0, dim, sums);
  } else {
    add_dims<kFast, kRows>(terms, 0, dim < kBlock ? dim : kBlock, sums);
    if (dim > kBlock) {
      Sum all[kRows];   // a copy: `sums` itself stays in registers
      for (int r = 0; r < kRows; ++r) all[r] = sums[r];
      add_more_blocks<kFast, kRows>(terms, kBlock, dim, all);
      for (int r = 0; r < kRows; ++r) sums[r] = all[r];
    }
  }
  const Vec<T> log_weights = load(columns.log_weights + column);
  for (int r = 0; r < kRows; ++r) {
    Vec<T> logits = log_weights - T(0.5) * (sums[r].quadratic + sums[r].log_determinant());
    if constexpr (!kFast) logits = log_weights == -T(__builtin_inf()) ? log_weights : logits;
    store(tile + (row + r) * columns.stride + column, logits);
  }
}

// Part `k` of `parts` of what is packed next.
template <class T>
CSDIV_INLINE void prefetch_upcoming(const Stripe<T>& columns, int64_t k, int64_t parts) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = (columns.upcoming + kLine - 1) / kLine;
  for (int64_t line = lines * k / parts; line < lines * (k + 1) / parts; ++line) {
    __builtin_prefetch(columns.upcoming_means + line * kLine);
    __builtin_prefetch(columns.upcoming_variances + line * kLine);
  }
}

template <bool kFast, class T>
void logits_tile(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first_column, T* tile) {
  for (int64_t column = first_column; column < columns.padded; column += kLanes<T>) {
    if (columns.upcoming) prefetch_upcoming(columns, column / kLanes<T>, columns.padded / kLanes<T>);
    int64_t row = 0;
    for (; row + kRegisterRows <= rows.count; row += kRegisterRows)
      logits_rows<kFast, kRegisterRows>(rows, row, columns, column, tile);
    for (; row < rows.count; ++row) logits_rows<kFast, 1>(rows, row, columns, column, tile);
  }
}

template <class T>
void logits(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first_column, T* tile) {
  if (certified(rows.range, columns.range)) {
    switch (columns.form) {
      case Form::kDiagonal:
        return logits_tile<true>(rows, columns, first_column, tile);
      case Form::kSpherical:
        return structured_logits<Form::kSpherical>(rows, columns, first_column, tile);
      case Form::kSphericalTiedRows:
        return structured_logits<Form::kSphericalTiedRows>(rows, columns, first_column, tile);
      case Form::kTiedRows:
        return structured_logits<Form::kTiedRows>(rows, columns, first_column, tile);
      case Form::kTiedColumns:
        return structured_logits<Form::kTiedColumns>(rows, columns, first_column, tile);
    }
  }
  logits_tile<false>(rows, columns, first_column, tile);
  for (int64_t row = 0; row < rows.count; ++row)
    if (rows.invalid >> row & 1)
      for (int64_t j = first_column; j < columns.padded; ++j) tile[row * columns.stride + j] = T(__builtin_nan(""));
}

// All maxima first: no row waits for another.
template <class T>
void partial_sums(T* tile, int64_t rows, int64_t stride, int64_t count, PartialSum<T>* sums) {
  constexpr T kInfinity = T(__builtin_inf());
  for (int64_t row = 0; row < rows; ++row) {
    Vec<T> largest = broadcast<T>(-kInfinity);
    for (int64_t j = 0; j < count; j += kLanes<T>) largest = maximum<T>(largest, load(tile + row * stride + j));
    sums[row].max = max_lane<T>(largest);
  }
  for (int64_t row = 0; row < rows; ++row) {
    T* const logits = tile + row * stride;
    const T max = sums[row].max;
    Vec<T> total{};
    if (max == kInfinity) {
      for (int64_t j = 0; j < count; j += kLanes<T>) total += maximum<T>(Vec<T>{}, load(logits + j));
    } else {
      const T shift = max > -kInfinity ? max : T(0);
      for (int64_t j = 0; j < count; j += kLanes<T>) {
        const Vec<T> term = exp<T>(load(logits + j) - shift);
        store(logits + j, term);
        total += term;
      }
    }
    sums[row].sum = sum<T>(total);
  }
}

// weight(row, entries) of every vector of the tile, in place, added to the sums that are wanted.
template <class T, class Weight>
CSDIV_INLINE uint32_t weigh_rows(const RowTile<T>& rows, const Stripe<T>& columns, T* tile, T* column_sums,
                                 double* row_sums, const Weight& weight_of) {
  uint32_t active_rows = 0;
  for (int64_t row = 0; row < rows.count; ++row) {
    T* const weights = tile + row * columns.stride;
    Vec<T> total{};
    IntVec<T> nonzero{};
    for (int64_t j = 0; j < columns.padded; j += kLanes<T>) {
      const Vec<T> weight = weight_of(row, load(weights + j));
      store(weights + j, weight);
      if (column_sums) store(column_sums + j, load(column_sums + j) + weight);
      total += weight;
      nonzero |= weight != 0;
    }
    if (row_sums) row_sums[row] += sum<T>(total);
    if (any<T>(nonzero)) active_rows |= uint32_t(1) << row;
  }
  return active_rows;
}

template <class T>
uint32_t weights(const RowTile<T>& rows, const Stripe<T>& columns, const RowScale<T>& scale, T* tile, T* column_sums,
                 double* row_sums) {
  const FlushSubnormals flush;
  return weigh_rows(rows, columns, tile, column_sums, row_sums, [&](int64_t row, Vec<T> logits) {
    return row_weight<T>(logits, scale.log_normalizers[row], scale.grads[row]);
  });
}

template <class T>
uint32_t scale(const RowTile<T>& rows, const Stripe<T>& columns, const T* factors, T* tile, T* column_sums,
               double* row_sums) {
  const FlushSubnormals flush;
  return weigh_rows(rows, columns, tile, column_sums, row_sums,
                    [&](int64_t row, Vec<T> terms) { return factors[row] == 0 ? Vec<T>{} : factors[row] * terms; });
}

// How a pair's gradient is found: the two forms of pair.h, or with 1 / c in place of the variances of one side.
enum class Gradient { kExact, kFast, kRowPrecisions, kColumnPrecisions };

// Dimension d of kRows rows against the columns in which they have weights.
template <Gradient kGradient, bool kRowGrads, bool kColumnGrads, int kRows, class T>
CSDIV_INLINE void gradients_rows(const RowTile<T>& rows, int64_t row, int64_t d, const Stripe<T>& columns,
                                 const T* weights, const ActiveColumns<T>& active, const TileGradients<T>& grads,
                                 RowBlock<T>& block) {
  const int64_t stride = columns.stride, dim = rows.dim;
  const T* const means = columns.means + d * stride;
  const T* const variances =
      (kGradient == Gradient::kColumnPrecisions ? columns.precisions : columns.variances) + d * stride;
  const T* const row_variances = kGradient == Gradient::kRowPrecisions ? rows.precisions : rows.variances;
  const T* const first_weights = weights + row * stride;
  T* const grad_means = kColumnGrads ? grads.column_means + d * stride : nullptr;
  T* const grad_variances = kColumnGrads ? grads.column_variances + d * stride : nullptr;
  Vec<T> row_mean[kRows], row_variance[kRows], row_grad_mean[kRows], row_grad_variance[kRows];
  for (int r = 0; r < kRows; ++r) {
    row_mean[r] = broadcast<T>(rows.means[(row + r) * dim + d]);
    row_variance[r] = broadcast<T>(row_variances[(row + r) * dim + d]);
    row_grad_mean[r] = row_grad_variance[r] = Vec<T>{};
  }
  for (int k = 0; k < active.count; ++k) {
    for (int64_t j = active.runs[k].begin; j < active.runs[k].end; j += kLanes<T>) {
      const Vec<T> mean = load(means + j), variance = load(variances + j);
      Vec<T> column_grad_mean{}, column_grad_variance{};
      if constexpr (kColumnGrads) {
        column_grad_mean = load(grad_means + j);
        column_grad_variance = load(grad_variances + j);
      }
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> weight = load(first_weights + r * stride + j);
        const Vec<T> delta = row_mean[r] - mean;
        PairGradient<T> pair;
        if constexpr (kGradient == Gradient::kRowPrecisions)
          pair = pair_gradient_of_reciprocal<T>(weight, delta, row_variance[r]);
        else if constexpr (kGradient == Gradient::kColumnPrecisions)
          pair = pair_gradient_of_reciprocal<T>(weight, delta, variance);
        else
          pair = pair_gradient<kGradient == Gradient::kFast, T>(weight, delta, row_variance[r] + variance);
        row_grad_mean[r] += pair.mean;
        row_grad_variance[r] += pair.variance;
        column_grad_mean += pair.mean;
        column_grad_variance += pair.variance;
      }
      if constexpr (kColumnGrads) {
        store(grad_means + j, column_grad_mean);
        store(grad_variances + j, column_grad_variance);
      }
    }
  }
  if constexpr (kRowGrads) block.set(row, d, row_grad_mean, row_grad_variance);
}

template <Gradient kGradient, bool kRowGrads, bool kColumnGrads, class T>
void gradients_tile(const RowTile<T>& rows, const Stripe<T>& columns, const T* weights, uint32_t active_rows,
                    const TileGradients<T>& grads) {
  ActiveColumns<T> active[kTileRows];   // of a register tile in place of its first row
  for_active_rows(rows.count, active_rows, [&](int64_t row, auto count) {
    find_active_columns<count>(weights + row * columns.stride, columns, grads.first_column, rows.dim, active[row]);
  });
  for_row_blocks<kRowGrads>(rows, grads, true, [&](int64_t d, RowBlock<T>& block) {
    if (columns.upcoming) prefetch_upcoming(columns, d, rows.dim);
    for_active_rows(rows.count, active_rows, [&](int64_t row, auto count) {
      gradients_rows<kGradient, kRowGrads, kColumnGrads, count>(rows, row, d, columns, weights, active[row], grads,
                                                                block);
    });
  });
}

template <bool kRowGrads, bool kColumnGrads, class T>
void gradients_form(const RowTile<T>& rows, const Stripe<T>& columns, T* weights, uint32_t active_rows,
                    const TileGradients<T>& grads) {
  if (!certified(rows.range, columns.range))
    return gradients_tile<Gradient::kExact, kRowGrads, kColumnGrads>(rows, columns, weights, active_rows, grads);
  switch (columns.form) {
    case Form::kDiagonal:
      return gradients_tile<Gradient::kFast, kRowGrads, kColumnGrads>(rows, columns, weights, active_rows, grads);
    case Form::kSpherical:
    case Form::kSphericalTiedRows:
      return spherical_gradients<kRowGrads, kColumnGrads>(rows, columns, weights, active_rows, grads);
    case Form::kTiedRows:
      return gradients_tile<Gradient::kColumnPrecisions, kRowGrads, kColumnGrads>(rows, columns, weights, active_rows,
                                                                                  grads);
    case Form::kTiedColumns:
      return gradients_tile<Gradient::kRowPrecisions, kRowGrads, kColumnGrads>(rows, columns, weights, active_rows,
                                                                               grads);
  }
}

template <class T>
void gradients(const RowTile<T>& rows, const Stripe<T>& columns, T* weights, uint32_t active_rows,
               const TileGradients<T>& grads) {
  if (grads.row_means && grads.column_means)
    gradients_form<true, true>(rows, columns, weights, active_rows, grads);
  else if (grads.row_means)
    gradients_form<true, false>(rows, columns, weights, active_rows, grads);
  else if (grads.column_means)
    gradients_form<false, true>(rows, columns, weights, active_rows, grads);
}

// So many of each that none waits for another.
template <int kMultiplyAdds, int kAdditions, class T>
int64_t arithmetic_loop(int64_t rounds, T* kept) {
  Vec<T> products[kMultiplyAdds + 1], sums[kAdditions + 1];
  for (int k = 0; k < kMultiplyAdds; ++k) products[k] = broadcast<T>(T(k));
  for (int k = 0; k < kAdditions; ++k) sums[k] = broadcast<T>(T(k));
  const Vec<T> half = broadcast<T>(*kept);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int k = 0; k < kMultiplyAdds; ++k) products[k] = products[k] * half + half;
    for (int k = 0; k < kAdditions; ++k) sums[k] += half;
  }
  for (int k = 0; k < kMultiplyAdds; ++k) *kept += sum<T>(products[k]);
  for (int k = 0; k < kAdditions; ++k) *kept += sum<T>(sums[k]);
  return rounds * (kMultiplyAdds + kAdditions) * kLanes<T>;
}

template <class T>
int64_t arithmetic(int64_t rounds, Arithmetic kind, T* kept) {
  constexpr bool kManyRegisters = kVectorBytes == 64;   // 32, not 16
  if (kind == Arithmetic::kMultiplyAdds) return arithmetic_loop<12, 0>(rounds, kept);
  if (kind == Arithmetic::kAdditions) return arithmetic_loop<0, 12>(rounds, kept);
  return arithmetic_loop<kManyRegisters ? 12 : 8, kManyRegisters ? 12 : 6>(rounds, kept);
}

template <class T>
constexpr TileKernels<T> kKernels = {
    kLanes<T>,        certified<T>,         transpose<false, T>, transpose<true, T>, transpose_components<T>,
    range<T>,         exponentials<T>,      logits<T>,           partial_sums<T>,    weights<T>,
    scale<T>,         gradients<T>,         finite<T>,           add_sums<T>,        write_sums<T>,
    write_columns<T>, column_precisions<T>, row_precisions<T>,   tiny_overlap<T>,    arithmetic<T>};

}   // namespace

TileKernels<float> tile_kernels_f32() {
  return kKernels<float>;
}
TileKernels<double> tile_kernels_f64() {
  return kKernels<double>;
}

}   // namespace csdiv::cpu::CSDIV_ISA
