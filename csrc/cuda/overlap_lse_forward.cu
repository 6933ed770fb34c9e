#include "cuda.h"
#include "pack.h"
#include "row_sums.h"

namespace csdiv::cuda {
namespace {

// A thread for a row.
template <class T>
__global__ void combine_rows_kernel(RowTask<T> task, T* row_lse, double* offsets) {
  const int64_t n = task.problem.p.n, row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row < task.problem.batch * n) row_lse[row] = T(kLog2 * task.partials.log2_value(row / n, n, row % n));
  if (row < task.problem.batch) offsets[row] = log_offset(task.problem, row, false);
}

}   // namespace

template <class T>
void overlap_lse_forward(Context& context, Problem<T> problem, T* row_lse, double* offsets) {
  pack(context, problem);
  RowTasks<T> tasks{{{problem, false, {}, 0}}, 1};
  sum_rows(context, tasks);
  const int64_t threads = problem.batch * (problem.p.n > 1 ? problem.p.n : 1);
  launch(context, ceil_div(threads, kThreads), 0, combine_rows_kernel<T>, tasks.tasks[0], row_lse, offsets);
}

CSDIV_INSTANTIATE(overlap_lse_forward);

}   // namespace csdiv::cuda
