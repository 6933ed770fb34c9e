// The interface between the drivers (compiled once) and the tile kernels (compiled once per instruction set): plain
// data alone, see README.md.
#pragma once

#include <cstdint>

namespace csdiv::cpu {

constexpr int64_t kTileRows = 16;                     // rows whose logits or weights stay in cache together
constexpr int64_t kStripeColumns = 256;               // of a stripe at most; also bounds the terms of one accumulator
constexpr int64_t kMaxStride = kStripeColumns + 16;   // numbers from one dimension of a stripe to the next
constexpr int64_t kMaxDim = 1 << 22;        // the sum of D exponents must fit the 32-bit lanes of the float kernels
constexpr int64_t kMaxExponent = 1 << 30;   // and so must the scale exponent it starts from

// What loops for benchmarks consist of.
enum class Arithmetic { kMultiplyAdds, kAdditions, kBoth };

// The structure of a problem's variances, which decides what its pairs cost: structured_pair.h.
enum class Form {
  kDiagonal,
  kSpherical,           // those of one component are the same in all dimensions, on both sides
  kSphericalTiedRows,   // as well, and all rows have the same: 1 / c belongs to a column
  kTiedRows,            // all rows have the same, which differ between dimensions
  kTiedColumns,         // all columns have the same: 1 / c belongs to a row
};

// What a block of components spans; decides whether a tile may take the fast form.
template <class T>
struct Range {
  T mean_min, mean_max;
  T variance_min, variance_max;
  bool finite;
};

// Up to kTileRows consecutive components of p, read where the caller has them.
template <class T>
struct RowTile {
  const T* means;       // (count, dim)
  const T* variances;   // (count, dim)
  int64_t count;
  int64_t dim;
  uint32_t invalid;               // bit r: row r has a negative variance, its pairs are NaN
  int64_t exponents[kTileRows];   // scale exponent E of each row's problem
  Range<T> range;
  const T* precisions;         // (count, dim) 1 / c, of kTiedColumns; right where the tile is certified
  const T* log_determinants;   // (count) log|c| - E ln 2, of kTiedColumns
};

// Up to kStripeColumns components of q, packed structure-of-arrays.
// Padding columns have log weight -inf, mean 0 and variance 1.
template <class T>
struct Stripe {
  const T* means;         // (dim, stride)
  const T* variances;     // (dim, stride)
  const T* log_weights;   // (stride)
  int64_t count;          // real columns
  int64_t padded;         // count rounded up to whole vectors
  int64_t stride;
  Range<T> range;
  Form form;
  const T* precisions;   // (dim, stride) 1 / c, of tied rows; if spherical (stride); right where the tile is certified
  const T* log_scales;   // (stride) log_weights - (log|c| - E ln 2) / 2, of tied rows
  // Where distances may be taken from products, of the spherical forms; else null. See squares.h.
  const T* center;     // (dim)
  const T* centered;   // (dim, stride) means - center
  const T* norms;      // (stride) |means - center|^2
  // What is packed next, `upcoming` numbers of each: kernels bring it into the cache beside their arithmetic.
  const T *upcoming_means, *upcoming_variances;
  int64_t upcoming;
};

// sum of exp(logit) = exp(max) * sum where max is finite, and sum itself otherwise: 0, infinite or NaN.
template <class T>
struct PartialSum {
  T max;
  double sum;
};

// Sums over pairs of w u (means) and w (u^2 - 1/c) (variances), where u = delta / c; null: not wanted.
template <class T>
struct TileGradients {
  double* row_means;   // (count, dim) of the row tile
  double* row_variances;
  T* column_means;   // (dim, stride) of the stripe
  T* column_variances;
  bool variances_wanted;   // else the sums for variances may be left out
  int64_t first_column;    // of a mixture with itself: whole vectors before it have no weights
};

// Log weights of a tile's rows become weights: w = grad * exp(logit - log_normalizer).
template <class T>
struct RowScale {
  const T* log_normalizers;   // (count)
  const T* grads;             // (count)
};

constexpr int64_t kMaxTinyComponents = 32;   // of either side; more fill vectors by themselves
constexpr int64_t kMaxTinyDim = 8;

// A side of as many tiny problems as a vector has lanes. Arrays of gradients are added to; null: not wanted.
template <class T>
struct TinySide {
  const T* means;         // (n, dim, lanes)
  const T* variances;     // (n, dim, lanes)
  const T* log_weights;   // (n, lanes)
  int64_t n;
  T* grad_means = nullptr;         // (n, dim, lanes), of the sum of factor * values; all three or none
  T* grad_variances = nullptr;     // (n, dim, lanes)
  T* grad_log_weights = nullptr;   // (n, lanes)
};

// A tiny problem in each lane, whose pairs are computed one after the other.
template <class T>
struct TinyProblem {
  TinySide<T> p, q;
  int64_t dim;
  const int64_t* scale_exponents;   // (lanes) E
  bool self;                        // q is p: pairs j >= i, those with j > i twice
  T factor;
  T* terms;     // (p.n, q.n, lanes), scratch
  T* values;    // (lanes), LSE_i (log a_i + row_lse_i)
  T* row_lse;   // (p.n, lanes), LSE_j logit_ij, over j >= i of a self term
};

// One tile is (kTileRows, stride) of T.
template <class T>
struct TileKernels {
  int64_t lanes;
  // Whether a tile takes the fast form; then no logit overflows.
  bool (*certified)(const Range<T>& p, const Range<T>& q);
  // to[d, k] = from[k, d] for k < count and d < dim; rows are `from_stride` and `stride` apart.
  void (*transpose)(const T* from, int64_t from_stride, int64_t count, int64_t dim, T* to, int64_t stride);
  // The same past the caches, where the machine can, for what is not read soon.
  void (*transpose_past_caches)(const T* from, int64_t from_stride, int64_t count, int64_t dim, T* to, int64_t stride);
  // Means and variances (count, dim) to (dim, stride), and their range.
  Range<T> (*transpose_components)(const T* means, const T* variances, int64_t count, int64_t dim, T* to_means,
                                   T* to_variances, int64_t stride);
  // Range of `size` means and variances.
  Range<T> (*range)(const T* means, const T* variances, int64_t size);
  // to[k] = exp(min(from[k], cap)) for k < size.
  void (*exponentials)(const T* from, int64_t size, T cap, T* to);
  // tile[r, j] = log b_j - (quadratic form + log determinant - E ln 2) / 2 for j >= first_column.
  void (*logits)(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first_column, T* tile);
  // Logits to exp(logit - max), in place, where a row's max is finite; rows are `stride` apart.
  void (*partial_sums)(T* logits, int64_t rows, int64_t stride, int64_t count, PartialSum<T>* sums);
  // Logits to weights, in place; returns the bit mask of rows with a weight other than zero.
  uint32_t (*weights)(const RowTile<T>& rows, const Stripe<T>& columns, const RowScale<T>& scale, T* tile,
                      T* column_sums, double* row_sums);
  // The same from what partial_sums left: row r times factors[r], where 0 gives 0 whatever it multiplies.
  uint32_t (*scale)(const RowTile<T>& rows, const Stripe<T>& columns, const T* factors, T* tile, T* column_sums,
                    double* row_sums);
  // Leaves the weights in no particular state.
  void (*gradients)(const RowTile<T>& rows, const Stripe<T>& columns, T* weights, uint32_t active_rows,
                    const TileGradients<T>& grads);
  // Whether all of these are.
  bool (*finite)(const T* numbers, int64_t count);
  // to[k] += from[k], of whole vectors
  void (*add_sums)(const T* from, int64_t count, double* to);
  // out[k] = factor * sums[k], or with `add` that much more.
  void (*write_sums)(const double* sums, int64_t count, double factor, bool add, T* out);
  // The same of out[k, d] and sums[d, k] for k < count and d < dim; rows of `sums` are `stride` apart.
  void (*write_columns)(const double* sums, int64_t stride, int64_t count, int64_t dim, double factor, bool add,
                        T* out);
  // What tied rows and tied columns have beside the variances, for the padded columns and for the rows of a tile.
  void (*column_precisions)(const T* row_variances, int64_t dim, int64_t exponent, const Stripe<T>& columns, T* to,
                            T* log_scales);
  void (*row_precisions)(const RowTile<T>& rows, const T* column_variances, T* to, T* log_determinants);
  void (*tiny_overlap)(const TinyProblem<T>& problem);
  // A loop in registers, which shows what the machine can do at most; how many numbers it computes. `kept`: any.
  int64_t (*arithmetic)(int64_t rounds, Arithmetic kind, T* kept);
};

}   // namespace csdiv::cpu
