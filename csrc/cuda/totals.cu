#include "totals.h"

namespace csdiv::cuda {
namespace {

template <class T>
struct TotalShared {
  double maxima[kThreads], sums[kThreads];
};

CSDIV_DEVICE void add(double& max, double& sum, double other_max, double other_sum) {
  const double top = fmin(fmax(max, other_max), DBL_MAX);
  sum = sum * exp2(max - top) + other_sum * exp2(other_max - top);
  max = top;
}

// log2 sum_i a_i exp(row_lse_i) of a task's item, in every thread. `row_lse`: where these go as well, or null.
template <class T>
CSDIV_DEVICE double log2_total(const RowTask<T>& task, int64_t item, int64_t p_item, T* row_lse,
                               TotalShared<T>& shared) {
  const Mixture<T>& p = task.problem.p;
  const int lane = threadIdx.x;
  double max = -DBL_MAX, sum = 0;
  for (int64_t i = lane; i < p.n; i += kThreads) {
    const double row = task.partials.log2_value(item, p.n, i);
    if (row_lse) row_lse[i] = T(kLog2 * row);
    const double weight = p.log2_weights[p_item * p.tiles() * kTile + i];
    if (!counts(weight)) continue;
    add(max, sum, weight + row == INFINITY ? DBL_MAX : weight + row, weight + row == INFINITY ? INFINITY : 1);
  }
  __syncthreads();
  shared.maxima[lane] = max;
  shared.sums[lane] = sum;
  for (int step = kThreads / 2; step; step /= 2) {
    __syncthreads();
    if (lane < step) add(shared.maxima[lane], shared.sums[lane], shared.maxima[lane + step], shared.sums[lane + step]);
  }
  __syncthreads();
  return shared.maxima[0] + log2(shared.sums[0]);
}

// One block for a problem. Where problems share a side each of them adds up its rows.
template <class T>
__global__ void total_kernel(const __grid_constant__ RowTasks<T> tasks, Totals<T> totals) {
  CSDIV_SHARED(TotalShared<T>, shared);
  const int64_t b = blockIdx.x;
  const Problem<T>& problem = tasks.tasks[0].problem;
  double divergence = 0;   // what the terms leave out cancels
  for (int k = 0; k < tasks.count; ++k) {
    const RowTask<T>& task = tasks.tasks[k];
    const int64_t p_item = (k == 2 ? problem.q : problem.p).item(b);
    T* const row_lse = k == 0 && totals.row_lse ? totals.row_lse + b * problem.p.n : nullptr;
    const double value = kLog2 * log2_total(task, k == 0 ? b : p_item, p_item, row_lse, shared);
    divergence += k == 0 ? -value : 0.5 * value;
    if (threadIdx.x == 0)
      totals.values[b * tasks.count + k] = value + log_offset(task.problem, k == 0 ? b : p_item, true);
  }
  if (totals.divergences && threadIdx.x == 0) totals.divergences[b] = T(divergence);
}

}   // namespace

template <class T>
void total_rows(const Context& context, const RowTasks<T>& tasks, const Totals<T>& totals) {
  launch(context, tasks.tasks[0].problem.batch, sizeof(TotalShared<T>), total_kernel<T>, tasks, totals);
}

CSDIV_INSTANTIATE(total_rows);

}   // namespace csdiv::cuda
