// Gradients of sums over pairs: weights of the pairs, tile by tile, and a sweep over the dimensions for each tile.
#pragma once

#include "gradient_sums.h"
#include "partition.h"
#include "tile_logits.h"

namespace csdiv::cuda {

// What a pair weighs.
enum class Weights {
  kOfTotal,   // its share of its problem's sum over all pairs
  kOfRows,    // its share of its row's sum, times the gradient of the row
  kGiven,     // as in an array
};

// One sum over pairs.
template <class T>
struct GradientTask {
  Problem<T> problem;
  bool self;   // pairs of a mixture with itself: the upper triangle
  Weights weights;
  const double* row_lse = nullptr;   // kOfRows: (batch, n) values ...
  const T* given = nullptr;          // ... and their gradients; kGiven: (batch, n, m)
  const double* values = nullptr;    // kOfTotal: of problem b at b * value_stride
  int64_t value_stride = 1;
  const int64_t* index = nullptr;   // of a side alone: the item of each of the `problems` that have values; see Mixture
  int64_t problems = 0;             // 0: as many as there are items
  bool rows_wanted = true, columns_wanted = true;
  ComponentSums row_sums{}, column_sums{};
  Partition partition{};
  int64_t blocks = 0;   // in a phase

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
  int phase = 0;
};

// Takes scratch memory for the sums and runs all tasks: in one launch, or in several to save such memory.
template <class T>
void sweep_gradients(Context& context, GradientTasks<T>& tasks);

// The gradients of one task on a pair: runs it and writes them, times those of its values if `grad_values` has any.
template <class T>
void sweep_pair(Context& context, GradientTasks<T>& tasks, const T* grad_values, const SideGradients<T>& grad_p,
                const SideGradients<T>& grad_q);

}   // namespace csdiv::cuda
