// Components with full covariances in the form that their kernels read.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/kernels/full_tile.h"
#include "cpu/mixture.h"
#include "cpu/sweep/pack.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/memory.h"

namespace csdiv::cpu {

constexpr int64_t kFullColumns = 64;   // of a chunk; whole blocks for every instruction set

inline int64_t num_full_tiles(const Problem<double>& problem) {
  return ceil_div(problem.p.n, kFullRows);
}

// Whether the rows are points, so that each column is factored once, not once for every row.
inline bool has_points(const Problem<double>& problem) {
  return !problem.p.variances;
}

// Rows tile * kFullRows ... of a problem, in `records` of kFullRows * record_size numbers.
FullRows full_rows(const Problem<double>& problem, int64_t b, int64_t tile, double* records);

// All items of q in chunks. A component of weight zero is neutral, whatever its parameters; a log weight of +inf is
// NaN.
class PackedFullColumns {
 public:
  PackedFullColumns(const Problem<double>& problem, int threads);

  int64_t chunks() const { return ceil_div(n_, kFullColumns); }   // of one item
  int64_t columns(int64_t chunk) const { return std::min(kFullColumns, n_ - chunk * kFullColumns); }
  FullColumns chunk(int64_t item, int64_t chunk) const {
    return {records_.get() + offset(item, chunk), ceil_div(columns(chunk), lanes_), factored_, factors_};
  }
  FullColumns block(int64_t k) const {   // of all items
    return {records_.get() + k * record_size(dim_) * lanes_, 1, factored_, factors_};
  }

  // Where a chunk starts in an array of records like this one, of all items.
  int64_t offset(int64_t item, int64_t chunk) const {
    return (item * blocks_ + chunk * (kFullColumns / lanes_)) * record_size(dim_) * lanes_;
  }
  int64_t size() const { return records_.size(); }
  int64_t blocks() const { return blocks_; }   // of one item

 private:
  void pack(const Mixture<double>& q, int64_t item, int64_t block);

  int64_t n_, dim_, lanes_, blocks_;
  bool factored_, factors_;
  AlignedArray<double> records_;
};

// The first of a part's chunks that has a pair of the tile's rows.
inline int64_t first_chunk(Pairs pairs, const Part& chunks, int64_t tile) {
  return pairs == Pairs::kAll ? chunks.begin : std::max(chunks.begin, tile * kFullRows / kFullColumns);
}

// Logits of a row of the upper triangle, whose pairs beside the diagonal count twice.
inline void cut_to_upper_triangle(int64_t row, int64_t first, int64_t columns, double* logits) {
  for (int64_t j = 0; j < columns; ++j)
    logits[j] = first + j < row ? -INFINITY : logits[j] + (first + j > row ? kLog2 : 0.0);
}

}   // namespace csdiv::cpu
