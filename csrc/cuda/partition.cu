#include "partition.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tile_logits.h"

namespace csdiv::cuda {
namespace {

constexpr int kMaxTasks = 3;
constexpr double kSumBytes = 512 << 10;   // of copies for each multiprocessor, which are allowed in any case
constexpr double kMemoryWeight = 0.05;    // of blocks, given for as many bytes as are allowed
constexpr double kGoodEnough = 0.9;       // of what more memory would reach: too little to take it
// In the time that a block takes for a tile: a launch in one dimension, a copy of a tile's sums on one multiprocessor.
constexpr double kLaunchCost = 4, kCopyCost = 0.12;

struct Task {
  int64_t batch, row_tiles, column_tiles;
  int diagonal;                     // column tiles for each row tile that are below the diagonal; 0: none are
  double row_bytes, column_bytes;   // of one copy of the sums; 0: not wanted
};

template <class T>
Task task_of(const SweepSize& size, int64_t dim) {
  const double copy = double(size.batch) * double(2 * dim + 1) * sizeof(double);
  return {size.n > 0 ? size.batch : 0,
          ceil_div(size.n, kTile),
          ceil_div(size.m, kColumns<T>),
          size.self ? kTile / kColumns<T> : 0,
          size.rows_wanted ? copy * double(size.n) : 0,
          size.columns_wanted ? copy * double(size.m) : 0};
}

// Ranges of rows and of columns for each phase, and what follows.
struct Ranges {
  int64_t rows = 1, columns = 1;
  double blocks = INFINITY, bytes = 0;   // blocks of a phase that have tiles, at most
};

double tiles_of(const Task& task) {
  const double rows = double(task.row_tiles), columns = double(task.column_tiles);
  return double(task.batch) * (rows * columns - task.diagonal * rows * (rows - 1) / 2);
}

double blocks_of(const Task& task, int64_t phases, int64_t rows, int64_t columns) {
  const int64_t r = rows * phases, c = columns * phases;
  const int64_t most = std::min(r, task.row_tiles) * std::min(columns, task.column_tiles);
  if (!task.diagonal) return double(task.batch) * double(most);
  const double empty = (double(r - 1) * double(c - 1) + double(std::gcd(r, c) - 1)) / 2;
  // Blocks at the diagonal are in every second phase if the number of phases is even.
  const double uneven = phases % 2 == 0 ? double(std::max(rows, columns)) / 2 : phases > 1 && r != c ? 1 : 0;
  const double blocks = (double(r) * double(c) - empty) / double(phases) + uneven;
  return double(task.batch) * std::min(double(most), std::ceil(blocks));
}

// The fewest blocks of at most `longest` tiles; fewer bytes where there is not much between them.
Ranges fit(const Task& task, int64_t phases, double longest, double bytes_per_block) {
  Ranges best;
  double least = INFINITY;
  for (int64_t height = std::max(ceil_div(task.row_tiles, phases), int64_t(1)); height >= 1; --height) {
    const int64_t rows = std::max(ceil_div(ceil_div(task.row_tiles, height), phases), int64_t(1));
    height = std::max(ceil_div(task.row_tiles, rows * phases), int64_t(1));
    const int64_t width = int64_t(std::min(longest / double(height), double(task.column_tiles)));
    if (width >= 1) {
      const int64_t columns = ceil_div(ceil_div(task.column_tiles, width), phases);
      const double bytes = double(columns) * task.row_bytes + double(rows) * task.column_bytes;
      const double blocks = blocks_of(task, phases, rows, columns), score = blocks + bytes / bytes_per_block;
      if (score < least) least = score, best = {rows, columns, blocks, bytes};
    }
  }
  return best;
}

struct Choice {
  int64_t phases = 1;
  Ranges ranges[kMaxTasks];
  double blocks = 0, bytes = 0, cost = INFINITY;   // in the time of a tile
};

struct Search {
  const Task* tasks;
  int count;
  int64_t dim;
  double processors, slots, allowed, tiles = 0, problems = 0;

  // Blocks of at most `longest` tiles.
  Choice cut(int64_t phases, double longest) const {
    Choice choice{phases};
    for (int k = 0; k < count; ++k) {
      choice.ranges[k] = fit(tasks[k], phases, longest, allowed / (kMemoryWeight * slots));
      choice.blocks += choice.ranges[k].blocks;
      choice.bytes += choice.ranges[k].bytes;
    }
    return choice;
  }

  // With the shortest blocks of which `waves` times as many as run at once are enough.
  Choice shortest(int64_t phases, double waves) const {
    const double work = tiles / (double(phases) * slots);   // of a phase
    double low = std::max(std::ceil(work / waves), 1.0), high = low;
    Choice choice = cut(phases, high);
    while (choice.blocks > waves * slots && high < tiles) {
      low = high + 1;
      high = std::ceil(1.25 * high) + 1;
      choice = cut(phases, high);
    }
    while (low < high) {
      const double middle = std::floor((low + high) / 2);
      const Choice shorter = cut(phases, middle);
      if (shorter.blocks <= waves * slots)
        choice = shorter, high = middle;
      else
        low = middle + 1;
    }
    const double time = choice.blocks <= waves * slots ? std::min(waves * high, work + high) : INFINITY;
    const double copies = choice.bytes / double(sizeof(double) * kTile * (2 * dim + 1));
    choice.cost = double(phases) * (time + kLaunchCost / double(dim)) + kCopyCost * copies / processors;
    return choice;
  }

  // The fastest of those that need little memory, unless some more makes it much faster.
  Choice run(double least_bytes) const {
    const double limits[] = {allowed, std::max(2 * kSumBytes * processors, 1.2 * least_bytes), INFINITY};
    Choice best[3];
    const double least_waves = std::max(std::ceil(problems / slots), 1.0);
    int64_t most_tiles = 1;
    for (int k = 0; k < count; ++k) most_tiles = std::max(most_tiles, tasks[k].row_tiles);
    const auto attempt = [&](int64_t phases) {
      bool enough = false;
      for (double waves = least_waves; waves <= 4 * least_waves; waves *= 2) {
        const Choice choice = shortest(phases, waves);
        enough |= choice.bytes <= allowed && choice.cost < INFINITY;
        for (int k = 0; k < 3; ++k)
          if (choice.bytes <= limits[k] && choice.cost < best[k].cost) best[k] = choice;
      }
      return enough;
    };
    if (attempt(1)) return best[0];
    for (int64_t phases = 2; double(phases) * problems <= 2.4 * slots * count;) {
      attempt(phases);
      const int64_t even = ceil_div(most_tiles, ceil_div(most_tiles, phases));   // ranges of one size
      if (even < phases) attempt(even);
      phases = phases < 8 ? phases + 1 : phases * 9 / 8;
    }
    if (best[0].cost < INFINITY && kGoodEnough * best[0].cost <= best[1].cost) return best[0];
    return best[1].cost < INFINITY ? best[1] : best[2];
  }
};

}   // namespace

template <class T>
void choose_partitions(const SweepSize* sizes, int count, int64_t dim, int processors, Partition* partitions) {
  Task tasks[kMaxTasks];
  Search search{tasks, count, dim, double(processors), double(processors) * kResidentBlocks<T>, 0};
  double least_bytes = 0;
  for (int k = 0; k < count; ++k) {
    tasks[k] = task_of<T>(sizes[k], dim);
    search.tiles += tiles_of(tasks[k]);
    search.problems += double(tasks[k].batch);
    least_bytes += tasks[k].row_bytes + tasks[k].column_bytes;
  }
  search.allowed = std::max(kSumBytes * processors, least_bytes);
  const Choice choice = search.run(least_bytes);
  for (int k = 0; k < count; ++k)
    partitions[k] = {int(choice.ranges[k].rows * choice.phases), int(choice.ranges[k].columns * choice.phases),
                     int(choice.phases)};
}

CSDIV_INSTANTIATE(choose_partitions);

}   // namespace csdiv::cuda
