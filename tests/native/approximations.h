// What the hardware's approximate functions may round to: off by as much as the PTX manual allows, in a direction that
// depends on the argument.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace approximations {

inline float perturbed(double exact, double most, float argument) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof(bits));
  bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
  return float(exact + most * (double(bits >> 8) / (1 << 23) - 1));
}

inline float reciprocal(float x) {
  const double y = 1.0 / x;
  return std::isfinite(y) ? perturbed(y, std::fabs(y) * 0x1p-23, x) : float(y);
}

inline float log2(float x) {
  const double y = std::log2(double(x));
  return std::isfinite(y) ? perturbed(y, std::fmax(1.0, std::fabs(y)) * 0x1p-22, x) : float(y);
}

inline float exp2(float x) {
  const double y = std::exp2(double(x));
  if (x == 0 || !std::isfinite(y)) return float(y);
  return y < 0x1p-126 ? 0.0f : perturbed(y, y * 0x1p-22, x);
}

}   // namespace approximations
