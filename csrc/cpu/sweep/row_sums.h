// The sums over columns that a forward pass makes, with or without gradients beside it: the same bits either way.
#pragma once

#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/log_sum_exp.h"
#include "cpu/sweep/partition.h"

namespace csdiv::cpu {

// row_lse[b, i] = LSE_j logit_ij, in parts: one for each column group.
template <class T>
class RowSums {
 public:
  RowSums(const Problem<T>& problem, int64_t groups)
      : size_(problem.rows()), sums_(size_, groups), kernels_(tile_kernels<T>()) {}

  // One tile more, whose first row is `first` among those of all problems. Each logit becomes exp(logit - maxima[r]).
  void add(const RowTile<T>& rows, const Stripe<T>& columns, int64_t first, int64_t group, T* tile, double* maxima) {
    kernels_.logits(rows, columns, 0, tile);
    PartialSum<T> sums[kTileRows];
    kernels_.partial_sums(tile, rows.count, columns.stride, columns.padded, sums);
    for (int64_t r = 0; r < rows.count; ++r) {
      sums_.at(first + r, group).add(sums[r].max, sums[r].sum);
      maxima[r] = sums[r].max;
    }
  }

  double value(int64_t row) const { return sums_.value(row, row + 1); }

  void write(T* row_lse) const {
    for (int64_t row = 0; row < size_; ++row) row_lse[row] = T(value(row));
  }

 private:
  int64_t size_;
  PartialSums sums_;
  const TileKernels<T>& kernels_;
};

}   // namespace csdiv::cpu
