// Vectors of T on GCC/Clang vector extensions: one source for every instruction set.
// CSDIV_ISA names the namespace, so that no two builds of this header can be merged by the linker.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <utility>

// For what the hot loops consist of: a call would move their sums from registers to memory.
#define CSDIV_INLINE __attribute__((always_inline)) inline

namespace csdiv::cpu::CSDIV_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Float;

template <>
struct Float<float> {
  using Signed = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kRoundingShift = 0x1.8p23f;   // adding it rounds to an integer, kept in the low bits
  static constexpr float kExpMin = -87.33f;            // rounds to 2^-126
  static constexpr float kLn2High = 0x1.62e4p-1f;      // few bits: its products with exponents are exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int kExpTerms = 7;        // Taylor: 0.347^8 / 8! < 2^-27
  static constexpr int kLogTerms = 5;        // atanh series: 0.172^10 / 11 < 2^-28
  static constexpr float kTiny = 0x1p-64f;   // variances below are scaled by kTinyScale ...
  static constexpr float kTinyScale = 0x1p64f;
  static constexpr float kTinyRoot = 0x1p32f;   // ... and means by its root
  static constexpr int kTinyExponent = 64;
  // Certified: within these limits c^4 and delta^2 c^3 stay normal, and what underflows is below rounding.
  static constexpr float kVarianceMin = 0x1p-20f, kVarianceMax = 0x1p20f, kDeltaMax = 0x1p30f;
};

template <>
struct Float<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kRoundingShift = 0x1.8p52;
  static constexpr double kExpMin = -708.39;
  static constexpr double kLn2High = 0x1.62e42feep-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kExpTerms = 13;
  static constexpr int kLogTerms = 10;
  static constexpr double kTiny = 0x1p-512;
  static constexpr double kTinyScale = 0x1p512;
  static constexpr double kTinyRoot = 0x1p256;
  static constexpr int kTinyExponent = 512;
  static constexpr double kVarianceMin = 0x1p-200, kVarianceMax = 0x1p200, kDeltaMax = 0x1p150;
};

template <class T>
struct VecTypes {
  typedef T Value __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef typename Float<T>::Signed Int __attribute__((vector_size(kVectorBytes)));
  typedef typename Float<T>::Unsigned Bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecTypes<T>::Value;
template <class T>
using IntVec = typename VecTypes<T>::Int;
template <class T>
using BitsVec = typename VecTypes<T>::Bits;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(from);
}

template <class T>
inline void store(T* to, Vec<T> value) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(to) = value;
}

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};   // x - 0 is x, also for x = -0: compilers fold it
}

template <class T>
inline IntVec<T> broadcast_int(int64_t value) {
  return static_cast<typename Float<T>::Signed>(value) - IntVec<T>{};
}

// Lanes k and k ^ kDistance change places.
template <int kDistance, class V, int... kLane>
inline V swapped(V value, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(value, value, (kLane ^ kDistance)...);
}

// One lane out of all of them, in the order of a binary tree.
template <class T, int kDistance = kLanes<T> / 2, class V, class Combine>
CSDIV_INLINE auto reduce(V value, const Combine& combine) {
  value = combine(value, swapped<kDistance>(value, std::make_integer_sequence<int, kLanes<T>>()));
  if constexpr (kDistance > 1)
    return reduce<T, kDistance / 2>(value, combine);
  else
    return value[0];
}

template <class T>
inline T sum(Vec<T> value) {
  return reduce<T>(value, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// Of each lane whose index has the bit kDistance the one `kDistance` before it in b, of the others the same lane of a;
// or, with kUpper, of b and of the one `kDistance` after it in a.
template <int kDistance, bool kUpper, class V, int... kLane>
inline V interleaved(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  if constexpr (kUpper)
    return __builtin_shufflevector(a, b, (kLane & kDistance ? L + kLane : kLane + kDistance)...);
  else
    return __builtin_shufflevector(a, b, (kLane & kDistance ? L + kLane - kDistance : kLane)...);
}

// A square block changes rows and columns: halves, quarters and so on change places.
template <class T, int kDistance = kLanes<T> / 2>
CSDIV_INLINE void transpose_block(Vec<T> (&block)[kLanes<T>]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>();
  for (int r = 0; r < kLanes<T>; ++r) {
    if (r & kDistance) continue;
    const Vec<T> a = block[r], b = block[r + kDistance];
    block[r] = interleaved<kDistance, false>(a, b, kAll);
    block[r + kDistance] = interleaved<kDistance, true>(a, b, kAll);
  }
  if constexpr (kDistance > 1) transpose_block<T, kDistance / 2>(block);
}

// In every span of kSpan lanes: the units of kUnit lanes with an even index, or with kOdd an odd one, first those of a,
// then those of b.
template <int kUnit, int kSpan, bool kOdd, class V, int... kLane>
inline V every_other(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int L = sizeof...(kLane);
  return __builtin_shufflevector(a, b,
                                 (kLane / kSpan * kSpan + kLane % (kSpan / 2) / kUnit * 2 * kUnit + kOdd * kUnit +
                                  kLane % kUnit + (kLane % kSpan >= kSpan / 2 ? L : 0))...);
}

// sum(values[k]) in lane k, for which fewer lanes change places than one by one: first within 16 bytes, which takes no
// unit that multiplications need. kSummed: lanes that are already summed.
template <class T, int kSummed = 1, int kCount>
CSDIV_INLINE Vec<T> sums(const Vec<T> (&values)[kCount]) {
  constexpr int kShort = 16 / sizeof(T);
  constexpr int kUnit = kSummed < kShort ? 1 : kShort, kSpan = kSummed < kShort ? kShort : kLanes<T>;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes<T>>();
  if constexpr (kSummed == kLanes<T>) {
    return values[0];
  } else {
    Vec<T> pairs[(kCount + 1) / 2];
    for (int k = 0; k < kCount; k += 2) {
      const Vec<T> a = values[k], b = values[k + 1 < kCount ? k + 1 : k];
      pairs[k / 2] = every_other<kUnit, kSpan, false>(a, b, kAll) + every_other<kUnit, kSpan, true>(a, b, kAll);
    }
    return sums<T, 2 * kSummed>(pairs);
  }
}

// The second where either is NaN, as the hardware has it.
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
inline Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

template <class T>
inline T max_lane(Vec<T> value) {
  return reduce<T>(value, maximum<T>);
}

template <class T>
inline bool any(IntVec<T> mask) {
  return reduce<T>(mask, [](IntVec<T> a, IntVec<T> b) { return a | b; }) != 0;
}

#if defined(__AVX512F__)
template <>
inline bool any<float>(IntVec<float> mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}
template <>
inline bool any<double>(IntVec<double> mask) {
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
}
#endif

// 1 / c for a normal c whose reciprocal is normal: within 2 ulp.
template <class T>
inline Vec<T> fast_reciprocal(Vec<T> c) {
  return T(1) / c;
}

#if defined(__SSE2__)
template <>
inline Vec<float> fast_reciprocal<float>(Vec<float> c) {
#if defined(__AVX512F__)
  const Vec<float> r = __builtin_ia32_rcp14ps512_mask(c, Vec<float>{}, -1);
#elif defined(__AVX2__)
  const Vec<float> r = __builtin_ia32_rcpps256(c);
#else
  const Vec<float> r = __builtin_ia32_rcpps(c);
#endif
  return r + r * (1.0f - c * r);   // one Newton step
}
#endif

// While it lives, results that would be subnormal are 0: on Intel's CPUs each of them costs as much as a hundred
// others.
class [[maybe_unused]] FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : state_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(state_ | 0x8000); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(state_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  const unsigned state_;
#endif
};

// A positive normal x = mantissa * 2^(exponent - bias + 1), mantissa in [0.5, 1).
template <class T>
inline IntVec<T> biased_exponent(Vec<T> x) {
  return (IntVec<T>)((BitsVec<T>)x >> Float<T>::kMantissaBits);
}

template <class T>
inline Vec<T> mantissa(Vec<T> x) {
  using Bits = typename Float<T>::Unsigned;
  constexpr Bits kFraction = (Bits(1) << Float<T>::kMantissaBits) - 1;
  constexpr Bits kHalf = Bits(Float<T>::kBias - 1) << Float<T>::kMantissaBits;
  return (Vec<T>)(((BitsVec<T>)x & kFraction) | kHalf);
}

// exp(x) for x below the largest logarithm, within about 1 ulp; exact at 0, NaN at NaN. The power of two is one too
// small and the series twice too large, so that the power is 0 where the value would be subnormal: weights are normal
// numbers or 0.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using F = Float<T>;
  constexpr T kInverseLn2 = T(1.4426950408889634074);
  x = maximum<T>(broadcast<T>(F::kExpMin), x);
  const Vec<T> shifted = x * kInverseLn2 + F::kRoundingShift;
  const Vec<T> n = shifted - F::kRoundingShift;
  const Vec<T> r = (x - n * F::kLn2High) - n * F::kLn2Low;
  T coefficients[F::kExpTerms + 1] = {2};
  for (int k = 1; k <= F::kExpTerms; ++k) coefficients[k] = coefficients[k - 1] / T(k);
  Vec<T> series = broadcast<T>(coefficients[F::kExpTerms]);
  for (int k = F::kExpTerms - 1; k >= 0; --k) series = series * r + coefficients[k];
  const BitsVec<T> power = ((BitsVec<T>)shifted + typename F::Unsigned(F::kBias - 1)) << F::kMantissaBits;
  return series * (Vec<T>)power;
}

// log(m * 2^n) for m in [0.5, 1).
template <class T>
inline Vec<T> log(Vec<T> m, IntVec<T> n) {
  using F = Float<T>;
  const IntVec<T> low = m < broadcast<T>(T(0.70710678118654752440));
  m = low ? m + m : m;                                         // [sqrt(1/2), sqrt(2))
  const Vec<T> e = __builtin_convertvector(n + low, Vec<T>);   // a true lane is -1
  const Vec<T> s = (m - 1) * fast_reciprocal<T>(m + 1);
  const Vec<T> z = s * s;
  Vec<T> series = broadcast<T>(T(1) / (2 * F::kLogTerms + 1));
  for (int k = F::kLogTerms - 1; k >= 1; --k) series = series * z + T(1) / (2 * k + 1);
  const Vec<T> log_m = 2 * s + 2 * s * z * series;
  return e * F::kLn2High + (log_m + e * F::kLn2Low);
}

// The leading half of the digits: products of two such numbers are exact.
template <class T>
inline Vec<T> leading_half(Vec<T> x) {
  return (Vec<T>)((BitsVec<T>)x & ~((typename Float<T>::Unsigned(1) << (Float<T>::kMantissaBits + 2) / 2) - 1));
}

// exponent log 2 + high + low; `high` has 13 digits of float, 26 of double at most: its products with integers up to
// 2^11 are exact, with others rounded as the result is.
template <class T>
struct SplitLog {
  Vec<T> exponent, high, low;
};

// log(x (1 + error)) of a positive normal x. With f = m - 1 and m = (1 + s) / (1 - s), log m = 2 (s + s^3/3 + ...),
// where s = f / (m + 1) is kept in two parts.
template <class T>
inline SplitLog<T> split_log(Vec<T> x, Vec<T> error) {
  using F = Float<T>;
  Vec<T> m = mantissa<T>(x);
  const IntVec<T> below = m < broadcast<T>(T(0.70710678118654752440));
  m = below ? m + m : m;
  const Vec<T> exponent = __builtin_convertvector(biased_exponent<T>(x) + below, Vec<T>) - T(F::kBias - 1);
  const Vec<T> f = m - 1, m_high = leading_half<T>(m), r = fast_reciprocal<T>(m + 1);
  const Vec<T> s_high = leading_half<T>(f * r);
  const Vec<T> s_low = (f - s_high * (m_high + 1) - s_high * (m - m_high)) * r;
  const Vec<T> s = s_high + s_low, z = s * s;
  Vec<T> series = broadcast<T>(T(1) / (2 * F::kLogTerms + 1));
  for (int k = F::kLogTerms - 1; k >= 1; --k) series = series * z + T(1) / (2 * k + 1);
  return {exponent, 2 * s_high, 2 * (s_low + s * z * series) + error};
}

#if defined(__AVX512F__)
// Tables of 16 numbers, which a register holds, instead of longer series.
constexpr __mmask16 kEveryLane = -1;   // without a mask, GCC's headers warn of their own variables

// x = (k / 16) log 2 + r; the entries are the bits of 2^(j / 16), less j << 19, to which the bits of k << 19 are added.
template <>
inline Vec<float> exp<float>(Vec<float> x) {
  using F = Float<float>;
  constexpr IntVec<float> kPowers = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                     0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                     0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const Vec<float> shifted = x * (16 * 1.44269504f) + F::kRoundingShift;
  const Vec<float> k = shifted - F::kRoundingShift;
  const Vec<float> r = (x - k * (F::kLn2High / 16)) - k * (F::kLn2Low / 16);   // |r| <= log(2) / 32: r^4 / 24 < 2^-26
  const __m512i table = _mm512_maskz_permutexvar_epi32(kEveryLane, (__m512i)shifted, (__m512i)kPowers);
  const __m512i power =
      _mm512_add_epi32(table, _mm512_maskz_slli_epi32(kEveryLane, (__m512i)shifted, F::kMantissaBits - 4));
  const Vec<float> series = ((r * (1.0f / 6) + 0.5f) * r + 1.0f) * r + 1.0f;
  return x < F::kExpMin ? Vec<float>{} : series * (Vec<float>)power;
}

// log of the mantissa m of x, in [1, 2): m = (1 + f) / r, r near 1 / m with 7 bits, -log r = high + low.
struct MantissaLog {
  Vec<float> high, low;

  explicit MantissaLog(Vec<float> x) {
    constexpr Vec<float> kReciprocals = {1.0f,       0.9140625f, 0.8671875f, 0.8203125f, 0.78125f,   0.7421875f,
                                         0.7109375f, 0.6796875f, 0.65625f,   0.625f,     0.6015625f, 0.578125f,
                                         0.5625f,    0.5390625f, 0.5234375f, 0.5f};
    constexpr Vec<float> kHigh = {0,           0x1.7p-4f,   0x1.23cp-3f, 0x1.95cp-3f, 0x1.f98p-3f, 0x1.314p-2f,
                                  0x1.5d6p-2f, 0x1.8b6p-2f, 0x1.af6p-2f, 0x1.e14p-2f, 0x1.043p-1f, 0x1.189p-1f,
                                  0x1.269p-1f, 0x1.3c6p-1f, 0x1.4b7p-1f, 0x1.62ep-1f};
    constexpr Vec<float> kLow = {0x0p0f,           0x1.a615d6p-17f, 0x1.712a4ap-15f,  -0x1.a52308p-15f,
                                 0x1.1c6cb4p-15f,  0x1.e3c3a6p-15f, -0x1.08829ap-16f, 0x1.cd445ap-17f,
                                 -0x1.ad5b6ep-15f, 0x1.14344ep-15f, 0x1.82f9d8p-15f,  -0x1.1bf0dcp-17f,
                                 0x1.8844d4p-15f,  0x1.0186d8p-18f, -0x1.48347ap-20f, 0x1.0bfbe8p-15f};
    const __m512i entry =
        _mm512_maskz_srli_epi32(kEveryLane, _mm512_castps_si512(x), Float<float>::kMantissaBits - 4);   // lowest 4 bits
    const Vec<float> m = _mm512_maskz_getmant_ps(kEveryLane, x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    const Vec<float> f =
        m * Vec<float>(_mm512_maskz_permutexvar_ps(kEveryLane, entry, kReciprocals)) - 1;   // -1/32 to 1/16
    // log(1 + f) - f within 2^-32
    const Vec<float> series = ((0x1.873dbp-3f * f - 0x1.005126p-2f) * f + 0x1.555908p-2f) * f - 0x1.fffff6p-2f;
    high = _mm512_maskz_permutexvar_ps(kEveryLane, entry, kHigh);
    low = (Vec<float>(_mm512_maskz_permutexvar_ps(kEveryLane, entry, kLow)) + f * f * series) + f;
  }
};

template <>
inline SplitLog<float> split_log<float>(Vec<float> x, Vec<float> error) {
  const MantissaLog log(x);
  return {_mm512_maskz_getexp_ps(kEveryLane, x), log.high, log.low + error};
}

template <>
inline Vec<float> log<float>(Vec<float> m, IntVec<float> n) {
  using F = Float<float>;
  const MantissaLog log(m);
  const Vec<float> e = __builtin_convertvector(n - 1, Vec<float>);   // the mantissa is doubled there
  return (e * F::kLn2High + log.high) + (e * F::kLn2Low + log.low);
}
#endif

}   // namespace csdiv::cpu::CSDIV_ISA
