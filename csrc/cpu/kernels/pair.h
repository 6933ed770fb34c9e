// The pair term in both of its forms: delta = mu - nu, c = s + t in every dimension,
//   logit = log b - (sum_d delta^2 / c + sum_d log c - E ln 2) / 2.
// Fast: dimensions share reciprocals; allowed where the ranges certify that nothing leaves the normal numbers.
// Exact: one dimension at a time, right for every input.
#pragma once

#include "simd.h"
#include "tile.h"

namespace csdiv::cpu::CSDIV_ISA {

// Rows per register tile: what 16 or 32 vector registers hold.
constexpr int kRegisterRows = kVectorBytes == 64 ? 4 : 2;

constexpr int64_t kGroup = 4;    // dimensions that share one reciprocal and one step of the product
constexpr int64_t kTerms = 32;   // added up in one accumulator of the quadratic form, then as many such sums in another

template <class T>
inline bool certified(const Range<T>& p, const Range<T>& q) {
  using Limit = Float<T>;
  return p.finite && q.finite && p.variance_min >= 0 && q.variance_min >= 0 &&
         p.variance_min + q.variance_min >= Limit::kVarianceMin &&
         p.variance_max + q.variance_max <= Limit::kVarianceMax && p.mean_max - q.mean_min <= Limit::kDeltaMax &&
         q.mean_max - p.mean_min <= Limit::kDeltaMax;
}

// Running sum_d delta^2 / c, and prod_d c 2^-E as a mantissa and an integer exponent: one logarithm per pair.
template <class T>
struct PairSum {
  Vec<T> quadratic{};
  Vec<T> product = broadcast<T>(T(0.5));
  IntVec<T> exponent;

  PairSum() = default;
  PairSum(int64_t scale_exponent, int64_t factors)
      : exponent(broadcast_int<T>(1 - scale_exponent - factors * (Float<T>::kBias - 1))) {}

  void multiply(Vec<T> factor) {
    product *= factor;
    exponent += biased_exponent<T>(product);
    product = mantissa<T>(product);
  }

  Vec<T> log_determinant() const { return log<T>(product, exponent); }
};

// What rows and one vector of columns have in dimension d.
template <class T>
struct PairTerms {
  const T* row_means;
  const T* row_variances;
  int64_t dim;
  const T* column_means;
  const T* column_variances;
  int64_t stride;

  Vec<T> delta(int r, int64_t d) const { return row_means[r * dim + d] - load(column_means + d * stride); }
  Vec<T> c(int r, int64_t d) const { return row_variances[r * dim + d] + load(column_variances + d * stride); }
};

template <class T>
struct Fraction {
  Vec<T> numerator, denominator;
};

// sum of delta^2 / c of row r over kCount dimensions: x1/c1 + x2/c2 = (x1 c2 + x2 c1) / (c1 c2).
template <int kCount, class T>
CSDIV_INLINE Fraction<T> quadratic_fraction(const PairTerms<T>& terms, int r, int64_t d) {
  if constexpr (kCount == 1) {
    const Vec<T> delta = terms.delta(r, d);
    return {delta * delta, terms.c(r, d)};
  } else {
    const Fraction<T> a = quadratic_fraction<kCount / 2>(terms, r, d);
    const Fraction<T> b = quadratic_fraction<kCount - kCount / 2>(terms, r, d + kCount / 2);
    return {a.numerator * b.denominator + b.numerator * a.denominator, a.denominator * b.denominator};
  }
}

template <int kCount, int kRows, class T>
CSDIV_INLINE void add_group(const PairTerms<T>& terms, int64_t d, PairSum<T> (&sums)[kRows]) {
  for (int r = 0; r < kRows; ++r) {
    const Fraction<T> fraction = quadratic_fraction<kCount>(terms, r, d);
    sums[r].quadratic += fraction.numerator * fast_reciprocal<T>(fraction.denominator);
    sums[r].multiply(fraction.denominator);
  }
}

// A term whose c may be subnormal, brought to normal size: delta^2 / c is unchanged.
template <class T>
struct ExactTerm {
  Vec<T> delta, c;
  IntVec<T> tiny;

  ExactTerm(Vec<T> raw_delta, Vec<T> raw_c) : tiny(raw_c < Float<T>::kTiny) {
    delta = tiny ? raw_delta * Float<T>::kTinyRoot : raw_delta;
    c = tiny ? raw_c * Float<T>::kTinyScale : raw_c;
  }
};

// c = 0 gives +inf where delta = 0 in all such dimensions and -inf elsewhere, an infinite c or delta^2 gives -inf.
template <class T>
struct ExactPairSum : PairSum<T> {
  IntVec<T> singular{};

  ExactPairSum() = default;
  ExactPairSum(int64_t scale_exponent, int64_t dim) : PairSum<T>(scale_exponent, dim) {}

  void add(Vec<T> delta, Vec<T> c) {
    constexpr T kInfinity = T(__builtin_inf());
    const ExactTerm<T> term(delta, c);
    const IntVec<T> zero = term.c == 0;
    const Vec<T> distance = term.delta < 0 ? -term.delta : term.delta;
    Vec<T> quadratic = term.delta / term.c * term.delta;
    quadratic = zero ? (term.delta == 0 ? Vec<T>{} : distance * kInfinity) : quadratic;
    quadratic = term.c == kInfinity ? distance + kInfinity : quadratic;
    this->quadratic += quadratic;
    this->multiply(zero ? broadcast<T>(1) : term.c);
    this->exponent += term.tiny & -Float<T>::kTinyExponent;
    singular |= zero;
  }

  Vec<T> log_determinant() const {
    constexpr T kInfinity = T(__builtin_inf());
    const IntVec<T> infinite = singular & (this->quadratic != kInfinity);
    return infinite ? broadcast<T>(-kInfinity) : PairSum<T>::log_determinant();
  }
};

// f(row, count) for each register tile of rows that has an active one; `count` is a constant.
template <class F>
CSDIV_INLINE void for_active_rows(int64_t rows, uint32_t active_rows, const F& f) {
  constexpr uint32_t kRegisterMask = (1u << kRegisterRows) - 1;
  int64_t row = 0;
  for (; row + kRegisterRows <= rows; row += kRegisterRows)
    if (active_rows >> row & kRegisterMask) f(row, std::integral_constant<int, kRegisterRows>());
  for (; row < rows; ++row)
    if (active_rows >> row & 1) f(row, std::integral_constant<int, 1>());
}

// The columns in which some rows have a weight other than zero, as runs of whole vectors: the others add nothing to any
// sum.
template <class T>
struct ActiveColumns {
  struct Run {
    int32_t begin, end;
  };
  int count = 0;
  Run runs[kStripeColumns / kLanes<T> / 2 + 1];
};

// Of kRows rows; with few dimensions all columns, as to look at the weights costs half of what one dimension does.
template <int kRows, class T>
CSDIV_INLINE void find_active_columns(const T* weights, const Stripe<T>& columns, int64_t first_column, int64_t dim,
                                      ActiveColumns<T>& active) {
  constexpr int64_t kFewDims = 4;
  if (dim <= kFewDims) {
    active.runs[active.count++] = {int32_t(first_column), int32_t(columns.padded)};
    return;
  }
  bool inside = false;
  for (int64_t j = first_column; j < columns.padded; j += kLanes<T>) {
    BitsVec<T> bits{};
    for (int r = 0; r < kRows; ++r) bits |= (BitsVec<T>)load(weights + r * columns.stride + j);
    if (!any<T>((IntVec<T>)(bits + bits))) {   // without their signs
      inside = false;
    } else if (inside) {
      active.runs[active.count - 1].end = int32_t(j + kLanes<T>);
    } else {
      inside = true;
      active.runs[active.count++] = {int32_t(j), int32_t(j + kLanes<T>)};
    }
  }
}

// Sums of a tile's rows over its columns, for a block of dimensions; collected here, as rows are `dim` numbers apart
// where they belong.
template <class T>
class RowBlock {
 public:
  static constexpr int64_t kDims = 64;

  // Of `count` dimensions from `begin` on; `variances`: whether they have any.
  RowBlock(int64_t begin, int64_t count, bool variances) : begin_(begin), count_(count), variances_(variances) {
    for (int64_t k = 0; k < count * kTileRows; ++k) means_[k] = variance_sums_[k] = 0;
  }

  // In dimension d, from the sums of kRows rows in each lane.
  template <int kRows>
  CSDIV_INLINE void set_means(int64_t row, int64_t d, const Vec<T> (&lane_sums)[kRows]) {
    const Vec<T> totals = sums<T>(lane_sums);
    __builtin_memcpy(means_ + (d - begin_) * kTileRows + row, &totals, kRows * sizeof(T));
  }
  template <int kRows>
  CSDIV_INLINE void set(int64_t row, int64_t d, const Vec<T> (&means)[kRows], const Vec<T> (&variances)[kRows]) {
    T* const to = variance_sums_ + (d - begin_) * kTileRows + row;
    if constexpr (2 * kRows <= kLanes<T>) {   // both at once
      Vec<T> lane_sums[2 * kRows];
      for (int r = 0; r < kRows; ++r) {
        lane_sums[r] = means[r];
        lane_sums[kRows + r] = variances[r];
      }
      T totals[kLanes<T>];
      store(totals, sums<T>(lane_sums));
      __builtin_memcpy(means_ + (d - begin_) * kTileRows + row, totals, kRows * sizeof(T));
      __builtin_memcpy(to, totals + kRows, kRows * sizeof(T));
    } else {
      set_means(row, d, means);
      const Vec<T> totals = sums<T>(variances);
      __builtin_memcpy(to, &totals, kRows * sizeof(T));
    }
  }

  void add_to(const TileGradients<T>& grads, int64_t rows, int64_t dim) const {
    for (int64_t row = 0; row < rows; ++row) {
      double* const means = grads.row_means + row * dim + begin_;
      for (int64_t k = 0; k < count_; ++k) means[k] += means_[k * kTileRows + row];
      if (!variances_) continue;
      double* const variances = grads.row_variances + row * dim + begin_;
      for (int64_t k = 0; k < count_; ++k) variances[k] += variance_sums_[k * kTileRows + row];
    }
  }

 private:
  const int64_t begin_, count_;
  const bool variances_;
  T means_[kDims * kTileRows], variance_sums_[kDims * kTileRows];
};

// f(d, block) for all dimensions, where `block` takes the sums of the rows; it is added up if they are wanted.
template <bool kRowGrads, class T, class F>
CSDIV_INLINE void for_row_blocks(const RowTile<T>& rows, const TileGradients<T>& grads, bool variances, const F& f) {
  for (int64_t begin = 0; begin < rows.dim; begin += RowBlock<T>::kDims) {
    const int64_t end = begin + RowBlock<T>::kDims < rows.dim ? begin + RowBlock<T>::kDims : rows.dim;
    RowBlock<T> block(begin, end - begin, variances);
    for (int64_t d = begin; d < end; ++d) f(d, block);
    if constexpr (kRowGrads) block.add_to(grads, rows.count, rows.dim);
  }
}

// grad exp(logit - log_normalizer), a pair's share of its row's gradient; zero where the row's sum is 0 or infinite.
template <class T>
inline Vec<T> row_weight(Vec<T> logits, T log_normalizer, T grad) {
  const bool empty = grad == 0 || log_normalizer == T(__builtin_inf()) || log_normalizer == -T(__builtin_inf());
  // No weight exceeds 1: what is above comes from rounding.
  return empty ? Vec<T>{} : grad * exp<T>(minimum<T>(Vec<T>{}, logits - log_normalizer));
}

// w u and w (u^2 - 1/c), u = delta / c: the pair's share of the gradients to a mean and (twice) a variance.
template <class T>
struct PairGradient {
  Vec<T> mean, variance;
};

template <class T>
inline PairGradient<T> pair_gradient_of_reciprocal(Vec<T> weight, Vec<T> delta, Vec<T> reciprocal) {
  const Vec<T> u = delta * reciprocal;
  const Vec<T> mean = weight * u;
  return {mean, mean * u - weight * reciprocal};
}

template <bool kFast, class T>
inline PairGradient<T> pair_gradient(Vec<T> weight, Vec<T> delta, Vec<T> c) {
  if constexpr (kFast) {
    return pair_gradient_of_reciprocal<T>(weight, delta, fast_reciprocal<T>(c));
  } else {
    const ExactTerm<T> term(delta, c);
    const Vec<T> reciprocal = 1 / term.c;
    const Vec<T> u = term.delta * reciprocal;
    Vec<T> mean = weight * u;
    Vec<T> variance = weight * reciprocal * (u * term.delta - 1);
    mean = term.tiny ? mean * Float<T>::kTinyRoot : mean;
    variance = term.tiny ? variance * Float<T>::kTinyScale : variance;
    const IntVec<T> contributes = weight != 0;
    return {contributes ? mean : Vec<T>{}, contributes ? variance : Vec<T>{}};
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
