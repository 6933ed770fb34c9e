// A side in double where its numbers leave the range of float, with memory for its gradients.
#pragma once

#include <algorithm>

#include "cpu/cpu.h"
#include "cpu/system/memory.h"

namespace csdiv::cpu {

inline AlignedArray<double> widened(const float* from, int64_t size) {
  AlignedArray<double> to(from ? size : 0);
  std::copy_n(from, to.size(), to.get());
  return to;
}

inline void narrow(const AlignedArray<double>& from, float* to) {
  for (int64_t k = 0; to && k < from.size(); ++k) to[k] = float(from.get()[k]);
}

class WidenedSide {
 public:
  WidenedSide(const Mixture<float>& side, int64_t dim, const SideGradients<float>& grads)
      : side_(side),
        sizes_{side.batch * side.n * dim, side.batch * side.n * dim, side.batch * side.n},
        values_{widened(side.means, sizes_[0]), widened(side.variances, sizes_[1]),
                widened(side.log_weights, sizes_[2])},
        to_{grads.means, grads.variances, grads.log_weights} {
    for (int k = 0; k < 3; ++k) grads_[k] = AlignedArray<double>(to_[k] ? sizes_[k] : 0);
  }

  Mixture<double> mixture() const {
    return {values_[0].get(), values_[1].get(), values_[2].get(),     nullptr, side_.index, side_.batch,
            side_.n,          side_.same_dims,  side_.same_components};
  }

  SideGradients<double> grads() const { return {grads_[0].get(), grads_[1].get(), grads_[2].get()}; }

  void write_grads() const {
    for (int k = 0; k < 3; ++k) narrow(grads_[k], to_[k]);
  }

 private:
  const Mixture<float> side_;
  const int64_t sizes_[3];
  const AlignedArray<double> values_[3];
  float* const to_[3];
  AlignedArray<double> grads_[3];
};

}   // namespace csdiv::cpu
