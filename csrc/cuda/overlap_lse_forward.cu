#include "cuda.h"
#include "pack.h"
#include "row_sums.h"

namespace csdiv::cuda {
namespace {

template <class T>
__global__ void combine_rows_kernel(const __grid_constant__ RowTask<T> task, T* row_lse, double* offsets) {
  const bool first = task.partials.lane() == 0;
  const int64_t n = task.problem.p.n, row = task.partials.row_of_thread();
  if (first && row < task.problem.batch) offsets[row] = log_offset(task.problem, row, false);
  if (row >= task.problem.batch * n) return;
  const double log2_value = task.partials.row(row / n, n, row % n).log2_value();
  if (first) row_lse[row] = T(kLog2 * log2_value);
}

}   // namespace

template <class T>
void overlap_lse_forward(Context& context, Problem<T> problem, T* row_lse, double* offsets) {
  pack(context, problem);
  RowTasks<T> tasks{{{problem, false}}, 1};
  sum_rows(context, tasks);
  const int64_t rows = problem.batch * (problem.p.n > 1 ? problem.p.n : 1);
  launch(context, tasks.tasks[0].partials.row_blocks(rows), 0, combine_rows_kernel<T>, tasks.tasks[0], row_lse,
         offsets);
}

CSDIV_INSTANTIATE(overlap_lse_forward);

}   // namespace csdiv::cuda
