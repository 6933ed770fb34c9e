#include "cpu/scaled_gradients.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/kernels/dispatch.h"
#include "cpu/mixture.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kSlice = 1 << 16;   // numbers of one task

double factor_at(const Upstream& upstream, int64_t k) {
  return upstream.wide ? static_cast<const double*>(upstream.factors)[k]
                       : double(static_cast<const float*>(upstream.factors)[k]);
}

bool are_one(const Upstream& upstream) {
  if (upstream.count == 0) return false;
  const double first = factor_at(upstream, 0);
  bool same = first != 0;
  for (int64_t k = 0; k < upstream.count; ++k) same &= factor_at(upstream, k) == first;
  return same;
}

// Numbers begin ... end - 1 of an array; whether all were finite.
template <class T>
bool scale(const Upstream& upstream, const ScaledArray& array, int64_t begin, int64_t end) {
  const T* const from = static_cast<const T*>(array.from);
  T* const to = static_cast<T*>(array.to);
  const int64_t values = upstream.one_factor ? 1 : upstream.count, inner = std::max(array.size / values, int64_t(1));
  const bool finite = tile_kernels<T>().finite(from + begin, end - begin);   // before it is scaled in place
  for (int64_t k = begin; k < end;) {
    const T factor = T(factor_at(upstream, k / inner));
    const int64_t stop = std::min(end, (k / inner + 1) * inner);
    if (factor == 0)
      std::fill(to + k, to + stop, T(0)), k = stop;
    else
      for (; k < stop; ++k) to[k] = factor * from[k];
  }
  return finite;
}

}   // namespace

bool scaled_gradients(const Upstream& upstream, const std::vector<ScaledArray>& arrays, int threads) {
  if (upstream.one_factor && !are_one(upstream)) return false;
  bool large = true, ones = true;
  for (int64_t k = 0; k < (upstream.one_factor ? 1 : upstream.count); ++k)
    large &= std::abs(factor_at(upstream, k)) >= 1, ones &= factor_at(upstream, k) == 1;
  std::atomic<bool> finite{true};
  for (const ScaledArray& array : arrays) {
    if (ones && array.from == array.to) continue;
    parallel_for(ceil_div(array.size, kSlice), threads, [&](int64_t task) {
      const int64_t begin = task * kSlice, end = std::min(array.size, begin + kSlice);
      if (!(array.wide ? scale<double>(upstream, array, begin, end) : scale<float>(upstream, array, begin, end)))
        finite = false;
    });
  }
  return large || finite;
}

}   // namespace csdiv::cpu
