// The scales that logits and values are relative to, so that the terms of a divergence cancel before they are rounded.
#pragma once

#include "cpu/mixture.h"
#include "cpu/system/memory.h"

namespace csdiv::cpu {

// Gives a side its scale exponents, for as long as this lives: per item an even integer near the mean of
// sum_d log2(2 s_d) over its components that have a weight, of evenly spaced ones where they are many: any value near
// it serves.
template <class T>
class ScaleExponents {
 public:
  ScaleExponents(int64_t dim, Mixture<T>& side, int threads);

 private:
  AlignedArray<int64_t> exponents_;
};

// What is left out of each problem's values; the uniform weights of a side count where it has no log weights.
enum class Uniform { kNone, kOfQ, kOfBoth };
template <class T>
void offsets(const Problem<T>& problem, Uniform uniform, double* offsets);

}   // namespace csdiv::cpu
