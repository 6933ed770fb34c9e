// Gradients of sums over pairs: weights of the pairs, tile by tile, and a sweep over the dimensions for each tile.
#pragma once

#include "cuda.h"
#include "tile_logits.h"

namespace csdiv::cuda {

// What a pair weighs.
enum class Weights {
  kOfTotal,   // its share of its problem's sum over all pairs
  kOfRows,    // its share of its row's sum, times the gradient of the row
  kGiven,     // as in an array
};

// Sums over the pairs of each problem, before factors and signs: for every component dim values of sum_j w u, dim of
// sum_j w (u^2 - 1/c) and one of sum_j w. Copies belong to different blocks and are added up at the end.
struct ComponentSums {
  double* sums;   // (problems, copies, n, 2 dim + 1)
  int64_t copies;

  CSDIV_HOST_DEVICE double* of(int64_t problem, int64_t copy, int64_t n, int64_t k, int64_t dim) const {
    return sums + ((problem * copies + copy) * n + k) * (2 * dim + 1);
  }
};

// One sum over pairs, cut in blocks: a range of row tiles and a range of column tiles. The blocks of one range of rows
// have a copy of the columns' sums of their own, and the other way round.
template <class T>
struct GradientTask {
  Problem<T> problem;
  bool self;   // pairs of a mixture with itself: the upper triangle
  Weights weights;
  const double* rows = nullptr;     // kOfRows: (batch, n) values ...
  const T* given = nullptr;         // ... and their gradients; kGiven: (batch, n, m)
  const double* values = nullptr;   // kOfTotal: of problem b at b * value_stride
  int64_t value_stride = 1;
  const int64_t* index = nullptr;   // of a side alone: the item of each of the `problems` that have values; see Side
  int64_t problems = 0;             // 0: as many as there are items
  bool rows_wanted = true, columns_wanted = true;
  ComponentSums row_sums{}, column_sums{};
  int64_t blocks = 0;

  // The sum over all pairs, of some problem that has this one's items.
  CSDIV_DEVICE double value(int64_t item) const {
    int64_t b = problem.batch == 1 ? 0 : item;
    if (index)
      for (b = 0; b + 1 < problems && index[b] != item;) ++b;
    return values[b * value_stride];
  }
};

template <class T>
struct GradientTasks {
  GradientTask<T> tasks[3];
  int count;
};

// Where the gradients of a side come from: sums of a task, times `factor` and the gradients of its values.
template <class T>
struct GradientSource {
  ComponentSums sums;
  bool of_rows;    // the means take the minus sign: delta = mu - nu
  bool of_items;   // sums are for each item of the side, not for each problem
  double factor;
};

template <class T>
struct GradientSources {
  GradientSource<T> sources[3];
  int count;
  const T* grad_values;   // (batch) or null: 1
};

// The gradients of the sides of `batch` problems, all written in one launch.
template <class T>
struct GradientWrites {
  struct {
    Side<T> side;
    GradientSources<T> sources;
    SideGradients<T> grads;
    int64_t blocks;
  } sides[2];
  int count;
  int64_t batch, dim;

  void add(const Side<T>& side, const GradientSources<T>& sources, const SideGradients<T>& grads) {
    if (grads.wanted())
      sides[count++] = {side, sources, grads, ceil_div(side.items * side.n * (2 * dim + 1), int64_t(kThreads))};
  }
};

// Takes scratch memory for the sums and runs all tasks in one launch.
template <class T>
void sweep_gradients(Context& context, GradientTasks<T>& tasks);

// The gradients of one task on a pair: runs it and writes them, times those of its values if `grad_values` has any.
template <class T>
void sweep_pair(Context& context, GradientTasks<T>& tasks, const T* grad_values, const SideGradients<T>& grad_p,
                const SideGradients<T>& grad_q);

// Adds up the sources and writes the gradients.
template <class T>
void write_gradients(const Context& context, const GradientWrites<T>& writes);

}   // namespace csdiv::cuda
