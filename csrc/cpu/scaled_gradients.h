// Gradients that came with values, times the gradients that come from what the values were used for.
#pragma once

#include <cstdint>
#include <vector>

namespace csdiv::cpu {

// An array of one call's gradients: `size` numbers, of as many values each as the upstream gradient has, or of one.
struct ScaledArray {
  const void* from;
  void* to;
  int64_t size;
  bool wide;   // double, else float
};

// The gradient of each value, or with `one_factor` the same for all.
struct Upstream {
  const void* factors;   // (count)
  int64_t count;
  bool wide;
  bool one_factor;
};

// to = factor * from, and 0 where the factor is. False, and nothing is to be used: with `one_factor` the factors differ
// or are 0 or NaN; or a factor below 1 meets a gradient that is not finite, whose product may be.
bool scaled_gradients(const Upstream& upstream, const std::vector<ScaledArray>& arrays, int threads);

}   // namespace csdiv::cpu
