// sum_j 2^logit_ij of rows, online: over the tiles that a block goes through, its threads, and the parts of a row.
#pragma once

#include "tile_logits.h"

namespace csdiv::cuda {

constexpr int kTilesPerFlush = 256;   // at most 1024 terms in one float

// 2^max sum. The maximum stays finite, so that infinities and NaN show in the sum.
template <class T, class Sum>
struct LogSum {
  T max = -Float<T>::kMax;
  Sum sum = 0;

  CSDIV_DEVICE void add(T other_max, Sum other_sum) {
    const T top = fmax(max, other_max);
    sum = sum * Sum(approximate_exp2(max - top)) + other_sum * Sum(approximate_exp2(other_max - top));
    max = top;
  }

  CSDIV_DEVICE double log2_value() const { return double(max) + log2(double(sum)); }
};

// The sums of a block's rows. A thread has kThreadRows of them over its columns, and what was flushed of one of them,
// row threadIdx.x % kColumnThreads: in shared memory, as it is seldom needed.
template <class T>
using FlushedRows = LogSum<T, double>[kThreads];

template <class T>
struct RowSums {
  LogSum<T, T> own[kThreadRows];
  int tiles = 0;

  CSDIV_DEVICE void add(const Logits<T>& logits, FlushedRows<T>& flushed) {
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
      T top = own[a].max;
#pragma unroll
      for (int b = 0; b < kThreadColumns<T>; ++b) top = fmax(top, logits[a][b]);
      top = fmin(top, Float<T>::kMax);
      T sum = own[a].sum * approximate_exp2(own[a].max - top);
#pragma unroll
      for (int b = 0; b < kThreadColumns<T>; ++b) sum += approximate_exp2(logits[a][b] - top);
      own[a].max = top;
      own[a].sum = sum;
    }
    if (++tiles == kTilesPerFlush) flush(flushed);
  }

  CSDIV_DEVICE void flush(FlushedRows<T>& flushed) {
    LogSum<T, T> kept;
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
      for (int step = kColumnThreads / 2; step; step /= 2) {
        const T max = __shfl_xor_sync(~0u, own[a].max, step), sum = __shfl_xor_sync(~0u, own[a].sum, step);
        own[a].add(max, sum);
      }
      const LogSum<T, T> row = own[a];   // read in any case: an index known at run time alone would cost local memory
      if (int(threadIdx.x) % kColumnThreads == a) kept = row;
      own[a] = LogSum<T, T>();
    }
    flushed[threadIdx.x].add(kept.max, double(kept.sum));
    tiles = 0;
  }
};

// What was summed of every row in each of its parts: (problems, parts, n).
template <class T>
struct RowPartials {
  T* maxima;
  double* sums;
  int64_t parts;

  CSDIV_DEVICE double log2_value(int64_t problem, int64_t n, int64_t i) const {
    LogSum<T, double> total;
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t at = (problem * parts + k) * n + i;
      total.add(maxima[at], sums[at]);
    }
    return total.log2_value();
  }
};

// One sum over pairs, cut in blocks: a tile of rows and a part of its columns. Of a mixture with itself the columns
// begin at the diagonal.
template <class T>
struct RowTask {
  Problem<T> problem;
  bool self;
  RowPartials<T> partials;
  int64_t blocks;
};

template <class T>
struct RowTasks {
  RowTask<T> tasks[3];
  int count;
};

// Takes scratch memory for the partial sums and runs all tasks in one launch.
template <class T>
void sum_rows(Context& context, RowTasks<T>& tasks);

}   // namespace csdiv::cuda
