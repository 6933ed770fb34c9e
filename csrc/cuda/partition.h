// How the pairs of problems are cut into blocks and into separate sums, by sizes and the number of multiprocessors.
#pragma once

#include <algorithm>

#include "tile_logits.h"

namespace csdiv::cuda {

constexpr int kBlocksPerProcessor = 2;             // as many as are resident at once: every one costs copies of sums
constexpr int kSumBytesPerProcessor = 256 << 10;   // of copies, from which on blocks are launched in phases
constexpr int kTilesPerPhase = 8;                  // of a block, so that launches do not show

// Blocks have a range of row tiles and a range of column tiles, (r, c). Those with (r + c) % phases = t are launched
// t-th: of the blocks that run at once, those of one range of rows have different c / phases, which is their copy of
// the rows' sums, and those of one range of columns different r / phases. Both numbers are multiples of the phases.
struct Partition {
  int row_ranges = 1, column_ranges = 1, phases = 1;

  CSDIV_HOST_DEVICE int row_copies() const { return column_ranges / phases; }
  CSDIV_HOST_DEVICE int column_copies() const { return row_ranges / phases; }
  CSDIV_HOST_DEVICE int blocks() const { return row_ranges * row_copies(); }   // in a phase
};

// In at most `wanted` blocks at a time: nearly as many as are possible, with the least copies of the sums of rows, of
// columns, or of both.
template <class T>
Partition choose_partition(const Problem<T>& problem, double wanted, int phases, bool rows_wanted,
                           bool columns_wanted) {
  const int64_t most = std::max(int64_t(wanted / phases), int64_t(1));
  const int64_t most_rows = std::clamp(problem.p.tiles() / phases, int64_t(1), most);
  const int64_t most_columns = std::clamp(column_tiles(problem) / phases, int64_t(1), most);
  const auto columns_for = [&](int64_t rows) { return std::min(most / rows, most_columns); };
  int64_t blocks = 0;
  for (int64_t rows = 1; rows <= most_rows; ++rows) blocks = std::max(blocks, rows * columns_for(rows));
  Partition partition;
  double least = DBL_MAX;
  for (int64_t rows = 1; rows <= most_rows; ++rows) {
    const int64_t columns = columns_for(rows);
    const double row_sums = rows_wanted ? double(columns) * double(problem.p.n) : 0;
    const double copies = row_sums + (columns_wanted ? double(rows) * double(problem.q.n) : 0);
    if (10 * rows * columns < 9 * blocks || copies >= least) continue;
    least = copies;
    partition = {int(rows) * phases, int(columns) * phases, phases};
  }
  return partition;
}

}   // namespace csdiv::cuda
