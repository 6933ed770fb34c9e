// One pair with full covariances: docs/math.md, equations (7) and (5). C = S + T is factored in the registers of one
// thread, or a row of it in those of each of a group of lanes. All of it is float64, whatever the dtype: so the terms
// of D_CS cancel without a shared scale. A data-centre GPU has float64 at half the rate of float32, a consumer one at
// 1/64.
#pragma once

#include <type_traits>

#include "mixture.h"

namespace csdiv::cuda {

constexpr int kMaxThreadDim = 5;   // a factor, an inverse and sums of as many numbers fit into 255 registers

CSDIV_HOST_DEVICE constexpr int64_t triangle(int64_t i, int64_t j = 0) {
  return i * (i + 1) / 2 + j;
}

// Of the sums for a component's gradients: dim for its mean, those for its covariance's lower triangle, row by row, and
// one for its weight.
CSDIV_HOST_DEVICE constexpr int64_t record_size(int64_t dim) {
  return dim + triangle(dim) + 1;
}

// Product of pivots: mantissas, none of which is below 1/2, and exponents apart.
struct Determinant {
  double mantissa = 1;
  int exponent = 0;
  bool positive_definite = true;

  CSDIV_DEVICE void multiply(double pivot) {
    positive_definite &= pivot >= DBL_MIN && pivot <= DBL_MAX;
    int its_exponent;
    mantissa *= frexp(pivot, &its_exponent);
    exponent += its_exponent;
  }

  // log2 N(mu; nu, C), where quadratic = delta' C^-1 delta.
  CSDIV_DEVICE double log2_density(double quadratic, int dim) const {
    const double log2_determinant = log2(mantissa) + exponent + dim * (kLog2E * kLog2Pi);
    return positive_definite ? -0.5 * (kLog2E * quadratic + log2_determinant) : double(NAN);
  }
};

// C = L diag(d) L' in one thread, L with a unit diagonal; kDim is the dimension.
template <int kDim>
class ThreadPair {
 public:
  static constexpr int kLanes = 1;
  struct Shared {};

  // Sums over pairs of w u, w (u u' - C^-1) and w, where u = C^-1 delta.
  struct Sums {
    double means[kDim] = {}, covariances[triangle(kDim)] = {}, weight = 0;

    CSDIV_DEVICE void write(double* record, int) const {
#pragma unroll
      for (int k = 0; k < kDim; ++k) record[k] = means[k];
#pragma unroll
      for (int k = 0; k < triangle(kDim); ++k) record[kDim + k] = covariances[k];
      record[record_size(kDim) - 1] = weight;
    }
  };

  // mean (dim) and covariance (dim, dim) of the thread's component.
  CSDIV_DEVICE ThreadPair(int, const double* mean, const double* covariance, Shared&) {
#pragma unroll
    for (int i = 0; i < kDim; ++i) {
      mean_[i] = mean[i];
#pragma unroll
      for (int j = 0; j <= i; ++j) covariance_[triangle(i, j)] = covariance[i * kDim + j];
    }
  }

  // Of the pair with another component.
  CSDIV_DEVICE double log2_density(const double* mean, const double* covariance, bool) {
    Determinant determinant;
    double quadratic = 0;
#pragma unroll
    for (int i = 0; i < kDim; ++i) {
      double scaled[kDim];   // a row of L diag(d)
      double pivot = covariance_[triangle(i, i)] + covariance[i * kDim + i];
      double solved = mean_[i] - mean[i];   // L^-1 delta
#pragma unroll
      for (int j = 0; j < i; ++j) {
        double value = covariance_[triangle(i, j)] + covariance[i * kDim + j];
#pragma unroll
        for (int k = 0; k < j; ++k) value -= scaled[k] * lower_[triangle(j, k)];
        scaled[j] = value;
        value *= lower_[triangle(j, j)];
        lower_[triangle(i, j)] = value;
        pivot -= value * scaled[j];
        solved -= value * solved_[j];
      }
      determinant.multiply(pivot);
      lower_[triangle(i, i)] = 1 / pivot;
      solved_[i] = solved;
      quadratic += solved * solved * lower_[triangle(i, i)];
    }
    return determinant.log2_density(quadratic, kDim);
  }

  // The last pair's, once.
  CSDIV_DEVICE void add_gradients(double weight, bool covariances, Sums& sums) {
    if (weight == 0) return;   // whatever it multiplies
    sums.weight += weight;
#pragma unroll
    for (int i = kDim - 1; i >= 0; --i) {
      double value = solved_[i] * lower_[triangle(i, i)];
#pragma unroll
      for (int k = i + 1; k < kDim; ++k) value -= lower_[triangle(k, i)] * solved_[k];
      solved_[i] = value;   // of u from here on
      sums.means[i] += weight * value;
    }
    if (!covariances) return;
    double inverse[triangle(kDim)];   // column by column, from L' C^-1 = diag(d)^-1 L^-1
#pragma unroll
    for (int j = kDim - 1; j >= 0; --j) {
#pragma unroll
      for (int i = kDim - 1; i >= j; --i) {
        double value = i == j ? lower_[triangle(j, j)] : 0;
#pragma unroll
        for (int k = j + 1; k < kDim; ++k)
          value -= inverse[k < i ? triangle(i, k) : triangle(k, i)] * lower_[triangle(k, j)];
        inverse[triangle(i, j)] = value;
        sums.covariances[triangle(i, j)] += weight * (solved_[i] * solved_[j] - value);
      }
    }
  }

 private:
  double mean_[kDim], covariance_[triangle(kDim)];
  double lower_[triangle(kDim)];   // L below its diagonal, 1 / d on it
  double solved_[kDim];            // L^-1 delta, then u
};

// Gauss-Jordan elimination by kWidth lanes, each with a row of C and of its inverse, which takes the place of C column
// by column. Columns move to the left by one in each step, so that the pivot's is always the first and indices are
// known when it is compiled; the inverse ends up at the right. Rows are divided by their pivots at the end.
template <int kWidth>
class GroupPair {
 public:
  static constexpr int kLanes = kWidth;
  struct Shared {
    alignas(16) double pivot_rows[2][kWidth + 2];   // by turns; with the right side
    alignas(16) double solved[kWidth];
  };

  // As above; a lane has its row of the covariance and its number of the mean.
  struct Sums {
    double covariances[kWidth] = {}, mean = 0, weight = 0;

    CSDIV_DEVICE void write(double* record, int dim) const {
      const int lane = threadIdx.x % kWidth;
      if (lane >= dim) return;
      record[lane] = mean;
      if (lane == 0) record[record_size(dim) - 1] = weight;
#pragma unroll
      for (int c = 0; c < kWidth; ++c)
        if (const int j = c - (kWidth - dim); j >= 0 && j <= lane) record[dim + triangle(lane, j)] = covariances[c];
    }
  };

  CSDIV_DEVICE GroupPair(int dim, const double* mean, const double* covariance, Shared& shared)
      : dim_(dim), lane_(threadIdx.x % kWidth), mean_(mean), covariance_(covariance), shared_(shared) {}

  // All lanes of the warp call it together. Without `invert` columns are dropped once they have been eliminated.
  CSDIV_DEVICE double log2_density(const double* mean, const double* covariance, bool invert) {
    const bool has_row = lane_ < dim_;
    int dim = dim_;
    forget(dim);   // or both components would stay in registers
    right_ = has_row ? mean_[lane_] - mean[lane_] : 0;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {   // symmetric: column c is row c
      const int at = c * dim + lane_;
      row_[c] = has_row && c < dim ? covariance_[at] + covariance[at] : 0;
    }
    Determinant determinant;
    double quadratic = 0;
#pragma unroll 1
    for (int k = 0; k < dim_; ++k) {
      double* const pivot_row = shared_.pivot_rows[turn_];
      turn_ ^= 1;
      if (lane_ == k) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) pivot_row[c] = row_[c];
        pivot_row[kWidth] = right_;
      }
      __syncwarp();
      const double pivot = pivot_row[0], right = pivot_row[kWidth], reciprocal = 1 / pivot;
      determinant.multiply(pivot);
      quadratic += right * right * reciprocal;
      if (lane_ == k) scale_ = reciprocal;
      const double factor = lane_ == k ? 0 : row_[0] * reciprocal;
      right_ -= factor * right;
      const int live = invert ? kWidth : dim_ - k;
#pragma unroll
      for (int c = 0; c < kWidth; c += 2) {
        if (c % 8 == 0 && c >= live) break;
        double pivots[2];
        load(pivot_row + c, pivots);
        if (c > 0) row_[c - 1] = row_[c] - factor * pivots[0];
        row_[c] = row_[c + 1] - factor * pivots[1];
      }
      row_[kWidth - 1] = lane_ == k ? 1 : -factor;
    }
    return determinant.log2_density(quadratic, dim_);
  }

  // All lanes of the warp call it together, after log2_density() with `invert` if covariances are wanted.
  CSDIV_DEVICE void add_gradients(double weight, bool covariances, Sums& sums) {
    const double solved = scale_ * right_, share = weight * solved;
    if (covariances && lane_ < dim_) shared_.solved[kWidth - dim_ + lane_] = solved;
    if (covariances && lane_ >= dim_) shared_.solved[lane_ - dim_] = 0;
    __syncwarp();
    if (weight == 0) return;
    sums.weight += weight;
    sums.mean += share;
    if (!covariances) return;
#pragma unroll
    for (int c = 0; c < kWidth; c += 2) {
      double others[2];
      load(shared_.solved + c, others);
#pragma unroll
      for (int k = 0; k < 2; ++k) sums.covariances[c + k] += share * others[k] - weight * scale_ * row_[c + k];
    }
  }

 private:
  const int dim_, lane_;
  const double *const mean_, *const covariance_;
  Shared& shared_;
  int turn_ = 0;
  double row_[kWidth], right_ = 0;
  double scale_ = 0;   // 1 / the pivot of the lane's row
};

template <int kWidth>
using FullPair = std::conditional_t<(kWidth <= kMaxThreadDim), ThreadPair<kWidth>, GroupPair<kWidth>>;

// f(width) with the width of the pairs that have this dimension as a constant.
template <int kWidth = 1, class F>
void with_width(int64_t dim, const F& f) {
  if constexpr (kWidth == kMaxFullDim)
    f(std::integral_constant<int, kWidth>());
  else if (dim <= kWidth)
    f(std::integral_constant<int, kWidth>());
  else
    with_width<(kWidth < kMaxThreadDim ? kWidth + 1 : kWidth < 8 ? 8 : 2 * kWidth)>(dim, f);
}

// What the warps of a block share out; nothing for pairs of one thread.
template <int kWidth>
struct FullShared {
  typename FullPair<kWidth>::Shared groups[kThreads / FullPair<kWidth>::kLanes];

  CSDIV_DEVICE typename FullPair<kWidth>::Shared& own() { return groups[threadIdx.x / FullPair<kWidth>::kLanes]; }
};

// Work is cut into warps, each with some components of one side and a part of the other's; they never wait for each
// other.
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kWarpsPerProcessor = 4 * kWarps;   // so that the last ones are short
constexpr int64_t kComponentsPerPart = 16;           // at least, where there are so many

template <int kWidth>
constexpr int kWarpComponents = kWarp / FullPair<kWidth>::kLanes;

// Parts that `tiles` of components meet the other side's in.
inline int64_t choose_parts(int64_t processors, int64_t tiles, int64_t others) {
  const int64_t wanted = ceil_div(processors * kWarpsPerProcessor, tiles > 0 ? tiles : 1);
  const int64_t most = ceil_div(others, kComponentsPerPart);
  return wanted < most ? wanted : most > 0 ? most : 1;
}

// A component's log weight, base 2.
CSDIV_DEVICE double log2_weight(const Mixture<double>& side, int64_t item, int64_t k) {
  return side.log_weights ? kLog2E * finite_weight(side.log_weights[item * side.n + k]) : 0;
}

}   // namespace csdiv::cuda
