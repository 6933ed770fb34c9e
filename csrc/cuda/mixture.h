// What kernels are given: two sides, packed in tiles, and the scale that they share.
#pragma once

#include "../instantiate.h"
#include "device.h"

#ifndef CSDIV_GROUP
#define CSDIV_GROUP 4
#endif

namespace csdiv::cuda {

constexpr int kTile = 64;             // components of a packed tile
constexpr int kGroup = CSDIV_GROUP;   // dimensions that share one reciprocal and one logarithm: 4; benchmarks try 1
constexpr int kFlagDims = 32;         // dimensions that share a flag
constexpr int64_t kMaxFullDim = 32;   // of full covariances: a warp has a row of one in each lane

// Of a tile in kFlagDims dimensions, after scaling.
enum Flags : uint8_t {
  kRegular = 1,   // variances finite, not negative and below the limit, means below the limit
  kWide = 2,      // no variance below the limit
};

CSDIV_HOST_DEVICE int64_t padded_dim(int64_t dim) {
  return ceil_div(dim, kGroup) * kGroup;
}
CSDIV_HOST_DEVICE int64_t flags_per_tile(int64_t dim) {
  return ceil_div(dim, kFlagDims);
}

// A component of weight zero counts nothing, whatever its parameters and its row. NaN does, to show.
template <class T>
CSDIV_DEVICE bool counts(T log_weight) {
  return log_weight != -T(INFINITY);
}

// An infinite weight is none: NaN.
template <class T>
CSDIV_DEVICE T finite_weight(T log_weight) {
  return log_weight == T(INFINITY) ? T(NAN) : log_weight;
}

// Mixtures of n components: as the caller has them, contiguous, and packed by pack().
template <class T>
struct Mixture {
  const T* means;         // (items, n, dim)
  const T* variances;     // (items, n, dim)
  const T* log_weights;   // (items, n); null: all 0
  const int64_t* index;   // the item that each problem uses; null: its own, or the only one
  int64_t items;
  int64_t n;
  T* values;          // (items, tiles, padded_dim, 2, kTile) scaled means and variances
  T* log2_weights;    // (items, tiles, kTile); -inf where there is no component
  uint8_t* flags;     // (items, tiles, flags_per_tile)
  double log_count;   // what uniform weights leave out: log n; 0 if weights are given
  bool same_dims;     // a component has one variance in all dimensions

  CSDIV_HOST_DEVICE int64_t tiles() const { return ceil_div(n, kTile); }
  CSDIV_HOST_DEVICE int64_t item(int64_t problem) const { return index ? index[problem] : items == 1 ? 0 : problem; }
  CSDIV_HOST_DEVICE bool own(int64_t problems) const { return !index && items == problems; }

  // Itself as the side of `items` problems.
  Mixture alone() const {
    Mixture side = *this;
    side.index = nullptr;
    return side;
  }
};

// Means times 2^k and variances times 4^k bring c = s + t near 2^center in every dimension. Logarithms of c are taken
// relative to center - 2k, which is exact; their sum over the dimensions is the reference.
template <class T>
struct Scale {
  int* exponents;       // (items, padded_dim) k
  T* centers;           // (items, padded_dim)
  T* group_centers;     // (items, padded_dim / kGroup) their sums
  double* references;   // (items) sum_d (center - 2k)
  int64_t items;        // 1: all problems share one
  bool same_dims;   // components of both sides have one variance in all dimensions, so exponents and centers are equal

  CSDIV_HOST_DEVICE int64_t item(int64_t problem) const { return items == 1 ? 0 : problem; }
};

// Rows p against columns q, `batch` times.
template <class T>
struct Problem {
  int64_t batch;
  int64_t dim;
  Mixture<T> p, q;
  Scale<T> scale;
};

// What the logits of problem b, and sums of them, leave out, in nats: the scale and the constants of the density and of
// uniform weights, those of p only where its weights count.
template <class T>
CSDIV_DEVICE double log_offset(const Problem<T>& problem, int64_t b, bool p_weights) {
  const double reference = problem.scale.references[problem.scale.item(b)];
  const double uniform = (p_weights ? problem.p.log_count : 0) + problem.q.log_count;
  return -0.5 * (kLog2 * reference + double(problem.dim) * kLog2Pi) - uniform;
}

}   // namespace csdiv::cuda
