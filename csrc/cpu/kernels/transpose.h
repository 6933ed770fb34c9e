// Components from (n, dim) to (dim, stride) and back, and what they span.
#pragma once

#include "simd.h"
#include "tile.h"

namespace csdiv::cpu::CSDIV_ISA {

// To an address that is a multiple of kVectorBytes, not through the caches; others see it after end_of_....
#if defined(__AVX512F__)
inline void store_past_caches(float* to, Vec<float> value) {
  _mm512_stream_ps(to, (__m512)value);
}
inline void store_past_caches(double* to, Vec<double> value) {
  _mm512_stream_pd(to, (__m512d)value);
}
inline void end_of_stores_past_caches() {
  _mm_sfence();
}
#else
template <class T>
inline void store_past_caches(T* to, Vec<T> value) {
  store(to, value);
}
inline void end_of_stores_past_caches() {}
#endif

// What some numbers span.
template <class T>
struct Span {
  Vec<T> min = broadcast<T>(T(__builtin_inf())), max = -min;
  Vec<T> excess{};   // NaN as soon as a number is not finite

  CSDIV_INLINE void include(Vec<T> numbers) {
    min = minimum<T>(min, numbers);
    max = maximum<T>(max, numbers);
    excess += numbers * 0;
  }
};

template <class T>
inline Range<T> range_of(const Span<T>& means, const Span<T>& variances) {
  return {-max_lane<T>(-means.min), max_lane<T>(means.max), -max_lane<T>(-variances.min), max_lane<T>(variances.max),
          sum<T>(means.excess + variances.excess) == 0};
}

template <class T>
inline Range<T> range(const T* means, const T* variances, int64_t size) {
  Span<T> of_means, of_variances;
  int64_t k = 0;
  for (; k + kLanes<T> <= size; k += kLanes<T>) {
    of_means.include(load(means + k));
    of_variances.include(load(variances + k));
  }
  for (; k < size; ++k) {
    of_means.include(broadcast<T>(means[k]));
    of_variances.include(broadcast<T>(variances[k]));
  }
  return range_of(of_means, of_variances);
}

// see(numbers) for all that are in whole blocks.
template <bool kPastCaches, class T, class See>
CSDIV_INLINE void transpose_seen(const T* from, int64_t from_stride, int64_t count, int64_t dim, T* to, int64_t stride,
                                 const See& see) {
  constexpr int64_t L = kLanes<T>;
  const int64_t whole_count = count / L * L, whole_dim = dim / L * L;
  const bool past_caches = kPastCaches && stride % L == 0 && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
  for (int64_t k = 0; k < whole_count; k += L) {
    for (int64_t d = 0; d < whole_dim; d += L) {
      Vec<T> block[L];
      for (int64_t r = 0; r < L; ++r) see(block[r] = load(from + (k + r) * from_stride + d));
      transpose_block<T>(block);
      for (int64_t r = 0; r < L; ++r) {
        T* const row = to + (d + r) * stride + k;
        past_caches ? store_past_caches(row, block[r]) : store(row, block[r]);
      }
    }
  }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t k = d < whole_dim ? whole_count : 0; k < count; ++k) to[d * stride + k] = from[k * from_stride + d];
  if (past_caches) end_of_stores_past_caches();
}

template <bool kPastCaches, class T>
inline void transpose(const T* from, int64_t from_stride, int64_t count, int64_t dim, T* to, int64_t stride) {
  transpose_seen<kPastCaches>(from, from_stride, count, dim, to, stride, [](Vec<T>) {});
}

template <class T>
inline Range<T> transpose_components(const T* means, const T* variances, int64_t count, int64_t dim, T* to_means,
                                     T* to_variances, int64_t stride) {
  if (count % kLanes<T> != 0 || dim % kLanes<T> != 0) {
    transpose<false>(means, dim, count, dim, to_means, stride);
    transpose<false>(variances, dim, count, dim, to_variances, stride);
    return range(means, variances, count * dim);
  }
  Span<T> of_means, of_variances;
  transpose_seen<false>(means, dim, count, dim, to_means, stride, [&](Vec<T> m) { of_means.include(m); });
  transpose_seen<false>(variances, dim, count, dim, to_variances, stride, [&](Vec<T> v) { of_variances.include(v); });
  return range_of(of_means, of_variances);
}

}   // namespace csdiv::cpu::CSDIV_ISA
