// sum_j 2^logit_ij of rows, online: over the tiles that a block goes through, its threads, and the parts of a row.
#pragma once

#include "tile_logits.h"

namespace csdiv::cuda {

constexpr int kTilesPerFlush = 256;          // at most 1024 terms in one float
constexpr int kRowBlocksPerProcessor = 24;   // some waves of resident blocks, so that the last one is short

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

// What was summed of every row in each of its parts: (problems, parts, n). Of a mixture with itself rows begin at the
// diagonal: `step` tiles of rows in the first part, as many `skip` parts later, and so on.
template <class T>
struct RowPartials {
  T* maxima;
  double* sums;
  int parts, step = INT32_MAX, skip = 1;

  // Lanes that add up a row, each some of its parts.
  CSDIV_HOST_DEVICE int lanes() const { return parts > 8 ? kWarp : 1; }
  CSDIV_DEVICE int lane() const { return int(threadIdx.x) % lanes(); }

  // In kernels with lanes for every row: how many blocks these are, and the row of a thread.
  int64_t row_blocks(int64_t rows) const { return ceil_div(rows * lanes(), kThreads); }
  CSDIV_DEVICE int64_t row_of_thread() const {
    return int64_t(blockIdx.x) * (kThreads / lanes()) + int(threadIdx.x) / lanes();
  }

  // The sum of row i, in the first of its lanes; all of them call it together.
  CSDIV_DEVICE LogSum<T, double> row(int64_t problem, int64_t n, int64_t i) const {
    LogSum<T, double> total;
#pragma unroll 4
    for (int k = int(i / kTile) / step * skip + lane(); k < parts; k += lanes()) {
      const int64_t at = (problem * parts + k) * n + i;
      total.add(maxima[at], sums[at]);
    }
    if (lanes() == 1) return total;
    for (int other = kWarp / 2; other; other /= 2) {
      const T max = __shfl_xor_sync(~0u, total.max, other);
      total.add(max, __shfl_xor_sync(~0u, total.sum, other));
    }
    return total;
  }
};

// What a block sums up: a tile of rows and some tiles of columns.
struct RowBlock {
  int problem, row_tile, part;
  Part columns;
};

// One sum over pairs, cut in blocks: each has a tile of rows and a part of its columns, `part_tiles` or what is left.
template <class T>
struct RowTask {
  Problem<T> problem;
  bool self;   // of a mixture with itself: the upper triangle
  RowPartials<T> partials{};
  int part_tiles = 0;
  int64_t blocks = 0;

  static constexpr int kDiagonalTiles = kTile / kColumns<T>;   // of columns, that a tile of rows meets on the diagonal

  int64_t pair_tiles() const {
    const int64_t rows = problem.p.tiles(), all = rows * column_tiles(problem);
    return problem.batch * (self ? all - kDiagonalTiles * rows * (rows - 1) / 2 : all);
  }

  // Cuts it in parts of at most `most` tiles of columns, or one more.
  void cut(int64_t most) {
    const int64_t rows = problem.p.tiles(), columns = column_tiles(problem);
    const int64_t equal = ceil_div(columns, ceil_div(columns, most));
    const bool round = self && equal > 1;   // to whole tiles on the diagonal
    part_tiles = int(round ? ceil_div(equal, kDiagonalTiles) * kDiagonalTiles : equal);
    partials.parts = int(ceil_div(columns, part_tiles));
    partials.step = int(round ? part_tiles / kDiagonalTiles : self || rows == 0 ? 1 : rows);
    partials.skip = round ? 1 : kDiagonalTiles;
    blocks = 0;
    for (int64_t row = 0, parts = partials.parts; row < rows; row += partials.step, parts -= partials.skip)
      blocks += parts * (rows - row < partials.step ? rows - row : partials.step);
    blocks *= problem.batch;
  }

  CSDIV_HOST_DEVICE RowBlock block(int64_t k) const {
    const int of_problem = int(blocks / problem.batch), columns = int(column_tiles(problem));
    int rest = int(k % of_problem), row_tile = 0, parts = partials.parts;
    for (; rest >= partials.step * parts; row_tile += partials.step, parts -= partials.skip)
      rest -= partials.step * parts;
    row_tile += rest / parts;
    const int part = partials.parts - parts + rest % parts, diagonal = self ? row_tile * kDiagonalTiles : 0;
    const int begin = part * part_tiles, end = begin + part_tiles;
    return {int(k / of_problem), row_tile, part, {begin > diagonal ? begin : diagonal, end < columns ? end : columns}};
  }
};

template <class T>
struct RowTasks {
  RowTask<T> tasks[3];
  int count;

  // As evenly as tiles allow: the longest block takes at most a twelfth of what blocks that run at once have to do.
  void cut(int processors) {
    int64_t tiles = 0;
    for (int k = 0; k < count; ++k) tiles += tasks[k].pair_tiles();
    const int64_t most = ceil_div(tiles, int64_t(processors) * kRowBlocksPerProcessor);
    for (int k = 0; k < count; ++k) tasks[k].cut(most > 0 ? most : 1);
  }
};

// Takes scratch memory for the partial sums and runs all tasks in one launch.
template <class T>
void sum_rows(Context& context, RowTasks<T>& tasks);

}   // namespace csdiv::cuda
