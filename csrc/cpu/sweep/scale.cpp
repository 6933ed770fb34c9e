#include "cpu/sweep/scale.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kScaleSample = 4096;   // components, of an item, that its scale exponent is taken from

// The sum of log2 of numbers, those left out that have none, and of how many. Between powers of two it is linear, as
// the bits of a number are.
struct SumOfLog2 {
  double sum = 0;
  int64_t count = 0;

  template <class T>
  void add(const T* values, int64_t size) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    constexpr int64_t kBlock = 1 << 16;
    constexpr int kExponentBits = sizeof(T) == 4 ? 8 : 11, kFraction = 31 - kExponentBits;   // of the upper 32 bits
    constexpr uint32_t kOne = 1u << kFraction, kLargest = ((1u << kExponentBits) - 1) << kFraction;
    uint64_t bits = 0, used = 0;
    for (int64_t begin = 0; begin < size; begin += kBlock) {
      const int64_t end = std::min(size, begin + kBlock);
      uint32_t low = 0, high = 0, count = 0;   // halves, whose sums over a block fit: vectors have as many as lanes
      for (int64_t k = begin; k < end; ++k) {
        Bits all;
        std::memcpy(&all, values + k, sizeof(T));
        const uint32_t upper = uint32_t(all >> (8 * sizeof(T) - 32));
        const uint32_t mask = -uint32_t(upper - kOne < kLargest - kOne);
        low += upper & mask & 0xffff;
        high += (upper & mask) >> 16;
        count -= mask;
      }
      bits += (uint64_t(high) << 16) + low;
      used += count;
    }
    sum += double(bits) / kOne - double(used) * ((1 << (kExponentBits - 1)) - 1);
    count += int64_t(used);
  }
};

template <class T>
int64_t scale_exponent(int64_t dim, const Mixture<T>& side, int64_t item) {
  const int64_t step = side.same_components ? std::max(side.n, int64_t(1)) : ceil_div(side.n, kScaleSample);
  const int64_t different = side.same_dims ? std::min(dim, int64_t(1)) : dim;
  const T* const variances = side.variances + item * side.n * dim;
  // Items of the same variances have one scale, whatever their weights.
  const T* log_weights = side.log_weights && !side.same_components ? side.log_weights + item * side.n : nullptr;
  if (log_weights && std::all_of(log_weights, log_weights + side.n, counts<T>)) log_weights = nullptr;
  SumOfLog2 log2;
  if (step == 1 && different == dim && !log_weights) {
    log2.add(variances, side.n * dim);
  } else {
    for (int64_t k = 0; k < side.n; k += step)
      if (!log_weights || counts(log_weights[k])) log2.add(variances + k * dim, different);
  }
  const double mean = log2.count ? 1 + log2.sum / double(log2.count) : 0;
  return 2 * std::llround(0.5 * mean * double(dim));
}

}   // namespace

template <class T>
ScaleExponents<T>::ScaleExponents(int64_t dim, Mixture<T>& side, int threads) : exponents_(side.batch) {
  constexpr int64_t kItems = 256;   // of one task
  parallel_for(ceil_div(side.batch, kItems), threads, [&](int64_t task) {
    for (int64_t item = task * kItems; item < std::min(side.batch, (task + 1) * kItems); ++item)
      exponents_.get()[item] = scale_exponent(dim, side, item);
  });
  side.scale_exponents = exponents_.get();
}

template <class T>
void offsets(const Problem<T>& problem, Uniform uniform, double* offsets) {
  constexpr double kLog2Pi = 1.8378770664093454836;
  double log_uniform = 0;
  if (uniform != Uniform::kNone && !problem.q.log_weights) log_uniform -= std::log(double(problem.q.n));
  if (uniform == Uniform::kOfBoth && !problem.p.log_weights) log_uniform -= std::log(double(problem.p.n));
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t exponents =
        problem.p.scale_exponent(problem.p.item(b), 0) + problem.q.scale_exponent(problem.q.item(b), 0);
    offsets[b] = log_uniform - 0.5 * (0.5 * kLog2 * double(exponents) + double(problem.dim) * kLog2Pi);
  }
}

template class ScaleExponents<float>;
template class ScaleExponents<double>;
CSDIV_INSTANTIATE(offsets);

}   // namespace csdiv::cpu
