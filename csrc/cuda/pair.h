// The pair term in both of its forms: delta = mu - nu, c = s + t in every dimension.
//   log2 of the density, constants left out = -(log2(e) sum_d delta^2 / c + sum_d log2 c) / 2
// Fast: groups of 4 dimensions share a reciprocal and a logarithm; for what pack() certified.
// Exact: one dimension at a time, right for every input.
#pragma once

#include <cstring>

#include "mixture.h"

namespace csdiv::cuda {

template <class T>
struct Fraction {
  T numerator, denominator;
};

// sum of delta^2 / c over kCount dimensions: x1/c1 + x2/c2 = (x1 c2 + x2 c1) / (c1 c2).
template <int kCount, class T>
CSDIV_DEVICE Fraction<T> quadratic_fraction(const T* delta, const T* c) {
  if constexpr (kCount == 1) {
    return {delta[0] * delta[0], c[0]};
  } else {
    const Fraction<T> a = quadratic_fraction<kCount / 2>(delta, c);
    const Fraction<T> b = quadratic_fraction<kCount / 2>(delta + kCount / 2, c + kCount / 2);
    return {a.numerator * b.denominator + b.numerator * a.denominator, a.denominator * b.denominator};
  }
}

// log2 of a normal number, within 1.4e-7 of itself: log2(1 + f) / f by its Chebyshev series to the eighth degree, where
// 1 + f is within the roots of 1/2 and 2. CUDA's own takes registers that the tile's sums have.
CSDIV_DEVICE float accurate_log2(float x) {
  constexpr int kRootOfHalf = 0x3f3504f3, kMantissaBits = 23;
  int bits;
  memcpy(&bits, &x, sizeof(bits));
  const int exponent = (bits - kRootOfHalf) >> kMantissaBits;
  bits -= exponent << kMantissaBits;
  float f;
  memcpy(&f, &bits, sizeof(f));
  f -= 1;
  constexpr float kSeries[] = {0.12614846f,  -0.20742103f, 0.21566986f,  -0.23892035f, 0.28791833f,
                               -0.36070484f, 0.4809106f,   -0.72134733f, 1.442695f};
  float sum = kSeries[0];
#pragma unroll
  for (int k = 1; k < 9; ++k) sum = fma(sum, f, kSeries[k]);
  return fma(sum, f, float(exponent));
}

CSDIV_DEVICE double accurate_log2(double x) {
  return log2(x);
}

template <class T>
struct PairSum {
  T quadratic = 0;         // sum_d delta^2 / c
  T log_determinant = 0;   // sum_d log2 c, less the reference

  CSDIV_DEVICE void add_group(const T (&delta)[kGroup], const T (&c)[kGroup], T center) {
    const Fraction<T> fraction = quadratic_fraction<kGroup>(delta, c);
    quadratic += fraction.numerator * approximate_reciprocal(fraction.denominator);
    log_determinant += approximate_log2(fraction.denominator) - center;
  }

  // c = 0 gives +inf where delta = 0 in all such dimensions and -inf elsewhere, an infinite c or delta^2 gives -inf.
  // `exponent`: of the scale 4^k, which is applied to the logarithm alone.
  CSDIV_DEVICE void add_exact(T delta, T c, int exponent, T center) {
    int power;
    const T mantissa = frexp(c, &power);
    log_determinant += (log2(mantissa) - center) + T(power + exponent);
    const bool tiny = c < Float<T>::kTiny;
    if (tiny) delta *= Float<T>::kTinyRoot, c *= Float<T>::kTinyScale;
    T term = delta / c * delta;
    if (c == 0) term = delta == 0 ? T(0) : fabs(delta) * T(INFINITY);
    if (c == T(INFINITY)) term = fabs(delta) + T(INFINITY);
    quadratic += term;
  }

  // Where all dimensions have this c = s + t its logarithm's rounding counts in each, and so does what c lost.
  CSDIV_DEVICE void set_log_determinant(T s, T t, int dim, T center) {
    const T c = s + t, of_t = c - s, lost = (s - (c - of_t)) + (t - of_t);
    log_determinant = T(dim) * fma(lost * approximate_reciprocal(c), T(kLog2E), accurate_log2(c) - center);
  }

  CSDIV_DEVICE T log2_density() const {
    if (quadratic == T(INFINITY)) return -T(INFINITY);
    constexpr T kHigh = T(kLog2E), kLow = T(kLog2E - double(kHigh));   // one rounding
    return T(-0.5) * fma(quadratic, kHigh, fma(quadratic, kLow, log_determinant));
  }
};

// u = delta / c and v = u^2 - 1/c: the pair's share of the gradients to a mean and (twice) a variance, times its
// weight.
template <class T>
struct PairGradient {
  T mean, variance;
};

template <class T>
CSDIV_DEVICE PairGradient<T> pair_gradient(T delta, T c) {
  const T reciprocal = approximate_reciprocal(c);
  const T u = delta * reciprocal;
  return {u, u * u - reciprocal};
}

template <class T>
CSDIV_DEVICE PairGradient<T> exact_pair_gradient(T weight, T delta, T c) {
  if (weight == 0) return {T(0), T(0)};
  const bool tiny = c < Float<T>::kTiny;
  if (tiny) delta *= Float<T>::kTinyRoot, c *= Float<T>::kTinyScale;
  const T reciprocal = 1 / c;
  const T u = delta * reciprocal;
  const T mean = weight * u, variance = weight * reciprocal * (u * delta - 1);
  if (!tiny) return {mean, variance};
  return {mean * Float<T>::kTinyRoot, variance * Float<T>::kTinyScale};
}

}   // namespace csdiv::cuda
