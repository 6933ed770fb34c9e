// How the pairs of a problem are cut into tasks and into separate sums, by sizes alone: never by the number of threads.
#pragma once

#include <algorithm>

#include "cpu/kernels/dispatch.h"
#include "cpu/mixture.h"
#include "cpu/sweep/pack.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {

constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kLopsided = 8;                     // ratio of the sides from which one of them is cut alone
constexpr int64_t kCopies = 8;                       // sets of sums when one side is cut alone
constexpr int64_t kFewGroups = 4;                    // of columns, at least where they alone are cut
constexpr int64_t kCheapCopies = int64_t(1) << 22;   // elements of column sums up to which every row block has its own
constexpr int64_t kValueTasks = 32;                  // that few rows against many columns are cut into
constexpr int64_t kBlockTiles = 8;                   // tiles that take their turns on a stripe

// One of three ways:
//   rows      many more rows than columns: blocks of rows, each with sums of its own for all columns;
//   columns   the other way round;
//   square    S row blocks and S column groups, in S phases: phase t runs (r, (r + t) mod S) for all r, so that no two
//             tasks share a row or a column, and one set of sums serves both sides.
struct Partition {
  int64_t row_blocks = 1, column_groups = 1;
  int64_t phases = 1;   // above 1: square

  int64_t row_copies() const { return phases > 1 ? 1 : column_groups; }
  int64_t column_copies() const { return phases > 1 ? 1 : row_blocks; }
};

// Of n rows in tiles against m columns in stripes, for the sums of rows, of columns, or of both. `column_sums`: how
// many numbers one set of them has.
inline Partition choose_partition(int64_t n, int64_t m, int64_t tiles, int64_t stripes, int64_t column_sums, bool rows,
                                  bool columns) {
  Partition partition;
  if (!columns && tiles >= kCopies) {
    partition.row_blocks = std::min(tiles, kMaxBlocks);
  } else if (n >= kLopsided * m) {
    partition.row_blocks = std::min(tiles, kCopies);
  } else if (m >= kLopsided * n || (!rows && stripes >= kFewGroups)) {
    partition.column_groups = std::min(stripes, kCopies);
  } else if (column_sums * kCopies <= kCheapCopies) {
    partition.row_blocks = std::clamp(tiles / 2, int64_t(1), kCopies);
  } else {
    partition.row_blocks = partition.column_groups = partition.phases = std::min({tiles, stripes, kMaxBlocks});
  }
  return partition;
}

// Of the first `tiles` tiles of rows against all columns.
template <class T>
Partition choose_partition(const Problem<T>& problem, const PackedColumns<T>& packed, int64_t tiles, bool rows,
                           bool columns) {
  const int64_t column_sums = problem.q.batch * packed.stripes() * (2 * problem.dim + 1) * packed.stride();
  return choose_partition(std::min(problem.p.n, tiles * kTileRows), problem.q.n, tiles, packed.stripes(), column_sums,
                          rows, columns);
}

// Groups of columns, and blocks of tiles that a stripe is read for once, where values of all `tiles` are summed.
template <class T>
int64_t value_groups(const Problem<T>& problem, const PackedColumns<T>& packed) {
  const int64_t tiles = num_row_tiles(problem);
  const Partition cut = choose_partition(problem, packed, tiles, true, true);
  if (cut.column_groups == 1 || cut.phases > 1) return cut.column_groups;
  return std::min(packed.stripes(), std::max(cut.column_groups, kValueTasks / std::max(tiles, int64_t(1))));
}

inline int64_t value_blocks(int64_t tiles, int64_t groups) {
  return std::max(ceil_div(tiles, kBlockTiles), groups >= kCopies ? 1 : std::min(tiles, kMaxBlocks));
}

// Threads for a pass over numbers that takes a cycle for each: waking one takes thousands.
inline int threads_for(int64_t numbers, int threads) {
  constexpr int64_t kFew = 1 << 15;
  return numbers < kFew ? 1 : threads;
}

// run(b): problems that share no sums run side by side; those that do run one after the other.
template <class T, class Run>
void for_each_problem(const Problem<T>& problem, bool rows_wanted, bool columns_wanted, int threads, const Run& run) {
  const auto own_items = [&](const Mixture<T>& side) { return !side.index && side.batch == problem.batch; };
  if ((!rows_wanted || own_items(problem.p)) && (!columns_wanted || own_items(problem.q))) {
    parallel_for(problem.batch, threads, run);
  } else {
    for (int64_t b = 0; b < problem.batch; ++b) run(b);
  }
}

// run(block, group) for all row blocks and column groups.
template <class Run>
void for_each_block(const Partition& cut, int threads, const Run& run) {
  const bool square = cut.phases > 1;
  for (int64_t phase = 0; phase < cut.phases; ++phase) {
    parallel_for(square ? cut.row_blocks : cut.row_blocks * cut.column_groups, threads, [&](int64_t task) {
      if (square)
        run(task, (task + phase) % cut.column_groups);
      else
        run(task / cut.column_groups, task % cut.column_groups);
    });
  }
}

// Which pairs are swept: all, or those with column >= row, of a mixture with itself, where the tiles on the diagonal
// are for `fill` to cut.
enum class Pairs { kAll, kUpperTriangle };

// The first column of a tile that is computed, where the pair of its first row with itself is in column `diagonal`.
template <class T>
int64_t first_in_triangle(int64_t diagonal) {
  const int64_t lanes = tile_kernels<T>().lanes;
  return std::max(diagonal, int64_t(0)) / lanes * lanes;
}

// Part `k` of `parts` of 0 ... size - 1.
struct Part {
  int64_t begin, end;
};
inline Part part(int64_t size, int64_t parts, int64_t k) {
  return {size * k / parts, size * (k + 1) / parts};
}

}   // namespace csdiv::cpu
