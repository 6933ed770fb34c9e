// How the pairs of problems are cut into blocks and into separate sums, by sizes and the number of multiprocessors.
#pragma once

#include "device.h"

namespace csdiv::cuda {

// Blocks have a range of row tiles and a range of column tiles, (r, c). Those with (r + c) % phases = t are launched
// t-th: of the blocks that run at once, those of one range of rows have different c / phases, which is their copy of
// the rows' sums, and those of one range of columns different r / phases. Both numbers are multiples of the phases.
struct Partition {
  int row_ranges = 1, column_ranges = 1, phases = 1;

  CSDIV_HOST_DEVICE int row_copies() const { return column_ranges / phases; }
  CSDIV_HOST_DEVICE int column_copies() const { return row_ranges / phases; }
  CSDIV_HOST_DEVICE int blocks() const { return row_ranges * row_copies(); }   // in a phase
};

// One sum over pairs.
struct SweepSize {
  int64_t batch, n, m;   // problems, rows and columns of each
  bool self = false;     // pairs of a mixture with itself: the upper triangle
  bool rows_wanted = true, columns_wanted = true;
};

// Cuts `count` sums, which are launched together, for a GPU of so many multiprocessors: such that the blocks which take
// longest are short, and the copies take little memory.
template <class T>
void choose_partitions(const SweepSize* sizes, int count, int64_t dim, int processors, Partition* partitions);

}   // namespace csdiv::cuda
