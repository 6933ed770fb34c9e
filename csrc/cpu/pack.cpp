#include "pack.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"
#include "thread_pool.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kTransposeColumns = 16;

// The padding keeps the dimensions of a full stripe out of the same cache sets.
template <class T>
int64_t stripe_stride(int64_t columns, int64_t stripe_columns, int64_t lanes) {
  if (columns < stripe_columns) return ceil_div(columns, lanes) * lanes;
  return stripe_columns + kCacheLine / int64_t(sizeof(T));
}

template <class T>
bool usable(T variance) {
  return std::isfinite(variance) && variance > 0;
}

}   // namespace

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
  return rows;
}

template <class T>
PackedColumns<T>::PackedColumns(const Problem<T>& problem, LogWeights log_weights, int64_t stripe_columns, int threads)
    : stripe_columns_(stripe_columns),
      stride_(stripe_stride<T>(problem.q.n, stripe_columns, tile_kernels<T>().lanes)),
      stripes_(ceil_div(problem.q.n, stripe_columns)),
      memory_(problem.q.batch * stripes_ * (2 * problem.dim + 1) * stride_),
      all_(problem.q.batch * stripes_) {
  parallel_for(all_.size(), threads,
               [&](int64_t task) { pack(problem.q, problem.dim, log_weights, task / stripes_, task % stripes_); });
}

template <class T>
void PackedColumns<T>::pack(const Mixture<T>& q, int64_t dim, LogWeights log_weights, int64_t item, int64_t s) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity(), kNaN = std::numeric_limits<T>::quiet_NaN();
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t first = s * stripe_columns_, count = std::min(stripe_columns_, q.n - first);
  T* const means = memory_.get() + (item * stripes_ + s) * (2 * dim + 1) * stride_;
  T* const variances = means + dim * stride_;
  T* const packed_weights = variances + dim * stride_;

  for (int64_t j = 0; j < stride_; ++j) {
    const bool real = j < count;
    const T weight = !real ? -kInfinity : log_weights == LogWeights::kZero ? T(0) : q.log_weight(item, first + j);
    packed_weights[j] = weight == kInfinity ? kNaN : weight;
  }
  for (int64_t begin = 0; begin < stride_; begin += kTransposeColumns) {
    const int64_t end = std::min(begin + kTransposeColumns, stride_);
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t k = std::min(j, count - 1);   // padding repeats the last component: the range stays tight
        const int64_t source = (item * q.n + first + k) * dim + d;
        const bool neutral = packed_weights[k] == -kInfinity;
        const T variance = neutral ? T(1) : q.variances[source];
        variances[d * stride_ + j] = variance;
        means[d * stride_ + j] = neutral ? T(0) : variance < 0 ? kNaN : q.means[source];
      }
    }
  }
  const int64_t padded = ceil_div(count, kernels.lanes) * kernels.lanes;
  all_[item * stripes_ + s] = {
      means, variances, packed_weights, count, padded, stride_, kernels.range(means, variances, dim * stride_)};
}

template <class T>
void scale_exponents(int64_t dim, const T* variances, int64_t batch, int64_t n, int64_t* exponents) {
  for (int64_t item = 0; item < batch; ++item) {
    double total = 0;
    int64_t used = 0;
    for (int64_t k = 0; k < n; ++k) {
      const T* const component = variances + (item * n + k) * dim;
      if (!std::all_of(component, component + dim, usable<T>)) continue;
      double mantissa = 1;
      int64_t exponent = dim;   // of 2^dim prod_d s_d
      for (int64_t d = 0; d < dim; ++d) {
        int step;
        mantissa = std::frexp(mantissa * component[d], &step);
        exponent += step;
      }
      total += double(exponent) + std::log2(mantissa);
      ++used;
    }
    exponents[item] = used ? 2 * std::llround(total / double(used) / 2) : 0;
  }
}

template RowTile<float> row_tile(const Problem<float>&, int64_t, int64_t);
template RowTile<double> row_tile(const Problem<double>&, int64_t, int64_t);
template class PackedColumns<float>;
template class PackedColumns<double>;
template void scale_exponents(int64_t, const float*, int64_t, int64_t, int64_t*);
template void scale_exponents(int64_t, const double*, int64_t, int64_t, int64_t*);

}   // namespace csdiv::cpu
