#include "cpu/sweep/pack.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kMinSphericalDim = 9;   // below, the logarithm of each pair costs more than its dimensions save
constexpr int64_t kMaxStructuredDim = 1 << 16;   // exponents times dim, and scale exponents, are exact in float
constexpr int64_t kMinProductDim = 16;           // below, sums of squares are as fast
constexpr int64_t kMaxProductDim = 1024;         // above, products add too many numbers in one accumulator
constexpr int64_t kMinProductBytes = 64;         // of a vector: shorter ones have ports of their own for differences
constexpr int64_t kNormTerms = 4;                // dimensions that a norm has in one accumulator
constexpr int64_t kCenterSample = 16;            // columns of a stripe that its center is the mean of: any will do
constexpr int64_t kGroupedTiles = 16;            // tiles of rows, below which there are more groups of columns
constexpr int64_t kLane = 16;                    // numbers that an array is a multiple of

// Whole tiles, as the self term needs it. Wide stripes cost less: sums over their columns are found once for each row.
// Narrower ones give more groups of columns, to few rows and to the square cut (partition.h).
template <class T>
int64_t stripe_width(const Problem<T>& problem) {
  const int64_t columns = problem.q.n, tiles = std::max(num_row_tiles(problem), int64_t(1));
  const bool cheap = problem.q.batch * columns * (2 * problem.dim + 1) * kCopies <= kCheapCopies;
  const int64_t groups = cheap ? std::clamp(kGroupedTiles / tiles, int64_t(1), kFewGroups) : kFewGroups;
  return std::clamp(ceil_div(columns, groups * kTileRows) * kTileRows, 4 * kTileRows, kStripeColumns);
}

// The padding keeps the dimensions of a full stripe out of the same cache sets.
template <class T>
int64_t stripe_stride(int64_t columns, int64_t width, int64_t lanes) {
  if (columns < width) return ceil_div(columns, lanes) * lanes;
  return width + kCacheLine / int64_t(sizeof(T));
}

// Of a stripe, what products take: its center, means relative to it, and their norms.
int64_t centered_size(int64_t dim, int64_t stride) {
  return ceil_div(dim, kLane) * kLane + (dim + 1) * stride;
}

}   // namespace

template <class T>
Form form_of(const Problem<T>& problem) {
  const Mixture<T>&p = problem.p, &q = problem.q;
  if (problem.dim > kMaxStructuredDim || problem.rows() == 0 || p.batch == 0 || q.batch == 0) return Form::kDiagonal;
  const bool spherical = p.same_dims && q.same_dims;
  if (p.same_components) return spherical ? Form::kSphericalTiedRows : Form::kTiedRows;
  if (spherical && problem.dim >= kMinSphericalDim) return Form::kSpherical;
  return q.same_components ? Form::kTiedColumns : Form::kDiagonal;
}

template <class T>
RowTile<T> row_tile(const Problem<T>& problem, int64_t b, int64_t tile) {
  const int64_t item = problem.p.item(b), first = tile * kTileRows, dim = problem.dim;
  RowTile<T> rows{};
  rows.means = problem.p.means + (item * problem.p.n + first) * dim;
  rows.variances = problem.p.variances + (item * problem.p.n + first) * dim;
  rows.count = std::min(kTileRows, problem.p.n - first);
  rows.dim = dim;
  rows.range = tile_kernels<T>().range(rows.means, rows.variances, rows.count * dim);
  const int64_t q_exponent = problem.q.scale_exponent(problem.q.item(b), 0);
  for (int64_t r = 0; r < rows.count; ++r) {
    rows.exponents[r] = (problem.p.scale_exponent(item, first + r) + q_exponent) / 2;
    const T* const variances = rows.variances + r * dim;
    if (rows.range.variance_min < 0 && std::any_of(variances, variances + dim, [](T s) { return s < 0; }))
      rows.invalid |= uint32_t(1) << r;
  }
  if (problem.p.precisions) {
    rows.precisions = problem.p.precisions + (item * problem.p.n + first) * dim;
    rows.log_determinants = problem.p.log_determinants + item * problem.p.n + first;
  }
  return rows;
}

template <class T>
PackedColumns<T>::PackedColumns(const Problem<T>& problem, LogWeights log_weights, Products products)
    : log_weights_(log_weights),
      form_(form_of(problem)),
      width_(stripe_width(problem)),
      stride_(stripe_stride<T>(problem.q.n, width_, tile_kernels<T>().lanes)),
      stripes_(ceil_div(problem.q.n, width_)),
      precision_dims_(form_ == Form::kTiedRows            ? problem.dim
                      : form_ == Form::kSphericalTiedRows ? 1
                                                          : 0),
      products_(products == Products::kYes && problem.dim >= kMinProductDim && problem.dim <= kMaxProductDim &&
                tile_kernels<T>().lanes * int64_t(sizeof(T)) >= kMinProductBytes &&
                (form_ == Form::kSpherical || form_ == Form::kSphericalTiedRows)),
      stripe_size_((2 * problem.dim + 1) * stride_ + (precision_dims_ ? (precision_dims_ + 1) * stride_ : 0) +
                   (products_ ? centered_size(problem.dim, stride_) : 0)) {}

template <class T>
void PackedColumns<T>::pack_all(const Problem<T>& problem, int threads) {
  memory_ = AlignedArray<T>(problem.q.batch * stripes_ * stripe_size_);
  all_.resize(problem.q.batch * stripes_);
  parallel_for(int64_t(all_.size()), threads, [&](int64_t task) {
    all_[task] = pack(problem, task / stripes_, task % stripes_, memory_.get() + task * stripe_size_);
  });
}

template <class T>
Stripe<T> PackedColumns<T>::pack(const Problem<T>& problem, int64_t item, int64_t s, T* memory) const {
  Stripe<T> stripe{};
  pack_components(problem.q, problem.dim, item, s, memory, stripe);
  memory += (2 * problem.dim + 1) * stride_;
  if (precision_dims_) {
    pack_precisions(problem, item, memory, stripe);
    memory += (precision_dims_ + 1) * stride_;
  }
  if (products_) pack_centered(problem.dim, memory, stripe);
  return stripe;
}

template <class T>
Stripe<T> PackedColumns<T>::pack_in_turn(const Problem<T>& problem, int64_t item, int64_t s, T* memory) const {
  Stripe<T> stripe = pack(problem, item, s, memory);
  const int64_t begin = (s + 1) * width_, end = std::min(begin + width_, problem.q.n);
  if (begin < end) {
    const int64_t first = (item * problem.q.n + begin) * problem.dim;
    stripe.upcoming_means = problem.q.means + first;
    stripe.upcoming_variances = problem.q.variances + first;
    stripe.upcoming = (end - begin) * problem.dim;
    constexpr int64_t kLine = kCacheLine / int64_t(sizeof(T));
    for (int64_t j = begin; j < end && problem.q.log_weights; j += kLine)
      __builtin_prefetch(problem.q.log_weights + item * problem.q.n + j);
  }
  return stripe;
}

template <class T>
void PackedColumns<T>::pack_components(const Mixture<T>& q, int64_t dim, int64_t item, int64_t s, T* means,
                                       Stripe<T>& stripe) const {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t first = s * width_, count = std::min(width_, q.n - first);
  T* const variances = means + dim * stride_;
  T* const packed_weights = variances + dim * stride_;

  std::fill_n(packed_weights, stride_, T(0));
  bool all_count = true;
  if (log_weights_ == LogWeights::kKept && q.log_weights) {
    std::copy_n(q.log_weights + item * q.n + first, count, packed_weights);
    if (!kernels.range(packed_weights, packed_weights, count).finite) {
      for (int64_t j = 0; j < count; ++j) packed_weights[j] = q.log_weight(item, first + j);
      all_count = std::all_of(packed_weights, packed_weights + count, counts<T>);
    }
  }
  std::fill(packed_weights + count, packed_weights + stride_, -T(INFINITY));
  const int64_t source = (item * q.n + first) * dim;
  Range<T> range =
      kernels.transpose_components(q.means + source, q.variances + source, count, dim, means, variances, stride_);
  for (int64_t row = 0; row < 2 * dim; ++row) {   // padding repeats the last component: the range stays tight
    T* const end = means + row * stride_ + count;
    std::fill_n(end, stride_ - count, end[-1]);
  }
  if (!all_count) {
    for (int64_t j = 0; j < stride_; ++j) {
      if (counts(packed_weights[std::min(j, count - 1)])) continue;
      for (int64_t d = 0; d < dim; ++d) {
        means[d * stride_ + j] = T(0);
        variances[d * stride_ + j] = T(1);
      }
    }
    range = kernels.range(means, variances, dim * stride_);
  }
  if (range.variance_min < 0 || !range.finite) {   // a NaN hides what came before it
    for (int64_t k = 0; k < dim * stride_; ++k)
      if (variances[k] < 0) means[k] = T(NAN);
    range.finite = false;
  }
  stripe.means = means;
  stripe.variances = variances;
  stripe.log_weights = packed_weights;
  stripe.count = count;
  stripe.padded = ceil_div(count, kernels.lanes) * kernels.lanes;
  stripe.stride = stride_;
  stripe.range = range;
  stripe.form = form_;
}

template <class T>
void PackedColumns<T>::pack_precisions(const Problem<T>& problem, int64_t item, T* precisions,
                                       Stripe<T>& stripe) const {
  T* const log_scales = precisions + precision_dims_ * stride_;
  const int64_t exponent = (problem.p.scale_exponent(0, 0) + problem.q.scale_exponent(item, 0)) / 2;
  tile_kernels<T>().column_precisions(problem.p.variances, problem.dim, exponent, stripe, precisions, log_scales);
  stripe.precisions = precisions;
  stripe.log_scales = log_scales;
}

template <class T>
void PackedColumns<T>::pack_centered(int64_t dim, T* center, Stripe<T>& stripe) const {
  if (!stripe.range.finite) return;   // takes the exact form
  T* const centered = center + ceil_div(dim, kLane) * kLane;
  T* const norms = centered + dim * stride_;
  const int64_t step = ceil_div(stripe.count, kCenterSample);
  double sums[kMaxStride] = {};
  std::fill_n(norms, stride_, T(0));
  for (int64_t d = 0; d < dim; ++d) {
    const T* const means = stripe.means + d * stride_;
    T sum = 0;
    for (int64_t j = 0; j < stripe.count; j += step) sum += means[j];
    center[d] = sum / T(ceil_div(stripe.count, step));
    for (int64_t j = 0; j < stride_; ++j) {
      const T mean = j < stripe.count ? means[j] - center[d] : T(0);
      centered[d * stride_ + j] = mean;
      norms[j] += mean * mean;
    }
    if ((d + 1) % kNormTerms != 0) continue;
    for (int64_t j = 0; j < stride_; ++j) sums[j] += norms[j];
    std::fill_n(norms, stride_, T(0));
  }
  for (int64_t j = 0; j < stride_; ++j) norms[j] = T(sums[j] + norms[j]);
  stripe.center = center;
  stripe.centered = centered;
  stripe.norms = norms;
}

namespace {

template <class T>
bool any_counts(const Mixture<T>& side) {
  return !side.log_weights || std::any_of(side.log_weights, side.log_weights + side.batch * side.n, counts<T>);
}

}   // namespace

template <class T>
RowPrecisions<T>::RowPrecisions(Problem<T>& problem) {
  if (form_of(problem) != Form::kTiedColumns) return;
  if (!any_counts(problem.q)) {   // their variances may be anything, as those of packed columns may
    problem.q.same_components = false;
    return;
  }
  Mixture<T>& p = problem.p;
  precisions_ = AlignedArray<T>(p.batch * p.n * problem.dim);
  log_determinants_ = AlignedArray<T>(p.batch * p.n);
  Problem<T> own = problem;   // each item of p once: the items of q have the same variances
  own.p.index = nullptr;
  own.q.index = nullptr;
  own.q.batch = 1;
  for (int64_t item = 0; item < p.batch; ++item) {
    for (int64_t tile = 0; tile < num_row_tiles(own); ++tile) {
      const int64_t first = item * p.n + tile * kTileRows;
      tile_kernels<T>().row_precisions(row_tile(own, item, tile), own.q.variances,
                                       precisions_.get() + first * problem.dim, log_determinants_.get() + first);
    }
  }
  p.precisions = precisions_.get();
  p.log_determinants = log_determinants_.get();
}

CSDIV_INSTANTIATE(form_of);
CSDIV_INSTANTIATE(row_tile);
template class PackedColumns<float>;
template class PackedColumns<double>;
template class RowPrecisions<float>;
template class RowPrecisions<double>;

}   // namespace csdiv::cpu
