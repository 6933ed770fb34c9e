#include "totals.h"

namespace csdiv::cuda {
namespace {

constexpr int64_t kStepsAtOnce =
    32;   // of a thread, parts of rows one after the other: more take a launch of their own
constexpr int kWarps = kThreads / kWarp;

using Sum = LogSum<double, double>;

struct TotalShared {
  double maxima[kWarps], sums[kWarps];
};

// The sums of a task's rows, a block for `rows` of them: (problems, blocks). Null: they were not added up before.
struct TotalParts {
  Sum* sums = nullptr;
  int64_t blocks = 0, rows = 0;
};

template <class T>
struct TotalTasks {
  RowTasks<T> rows;
  Totals<T> totals;
  TotalParts parts[3];
};

// What all threads have added up, in every one of them.
CSDIV_DEVICE Sum add_threads(const Sum& own, TotalShared& shared) {
  const int warp = threadIdx.x / kWarp;
  Sum total = own;
  for (int lane = kWarp / 2; lane; lane /= 2) total.max = fmax(total.max, __shfl_xor_sync(~0u, total.max, lane));
  __syncthreads();   // nobody reads what is there any more
  if (threadIdx.x % kWarp == 0) shared.maxima[warp] = total.max;
  __syncthreads();
  for (int k = 0; k < kWarps; ++k) total.max = fmax(total.max, shared.maxima[k]);
  total.sum *= exp2(own.max - total.max);
  for (int lane = kWarp / 2; lane; lane /= 2) total.sum += __shfl_xor_sync(~0u, total.sum, lane);
  if (threadIdx.x % kWarp == 0) shared.sums[warp] = total.sum;
  __syncthreads();
  total.sum = 0;
  for (int k = 0; k < kWarps; ++k) total.sum += shared.sums[k];
  return total;
}

// sum_i a_i exp(row_lse_i) over rows of a problem, in every thread. `row_lse`: where these go as well, or null.
template <class T>
CSDIV_DEVICE Sum add_rows(const RowTask<T>& task, int64_t b, int64_t begin, int64_t end, T* row_lse,
                          TotalShared& shared) {
  const Mixture<T>& p = task.problem.p;
  const T* const log2_weights = p.log2_weights + p.item(b) * p.tiles() * kTile;
  const int lanes = task.partials.lanes();
  Sum sum;
  for (int64_t i = begin + int(threadIdx.x) / lanes; i < end; i += kThreads / lanes) {
    const LogSum<T, double> row = task.partials.row(b, p.n, i);
    if (task.partials.lane() != 0) continue;
    if (row_lse) row_lse[i] = T(kLog2 * row.log2_value());
    if (!counts(log2_weights[i])) continue;
    const bool infinite = isinf(row.sum);   // whatever the weights are
    sum.add(infinite ? DBL_MAX : double(log2_weights[i]) + double(row.max), row.sum);
  }
  return add_threads(sum, shared);
}

// A block for some rows.
template <class T>
__global__ void add_rows_kernel(const __grid_constant__ TotalTasks<T> tasks) {
  CSDIV_SHARED(TotalShared, shared);
  int k = 0;
  int64_t block = blockIdx.x;
  const auto blocks = [&] { return tasks.rows.tasks[k].problem.batch * tasks.parts[k].blocks; };
  for (; block >= blocks(); ++k) block -= blocks();
  const RowTask<T>& task = tasks.rows.tasks[k];
  const TotalParts& parts = tasks.parts[k];
  const int64_t b = block / parts.blocks, n = task.problem.p.n, begin = block % parts.blocks * parts.rows;
  T* const row_lse = k == 0 && tasks.totals.row_lse ? tasks.totals.row_lse + b * n : nullptr;
  const Sum sum = add_rows(task, b, begin, begin + parts.rows < n ? begin + parts.rows : n, row_lse, shared);
  if (threadIdx.x == 0) parts.sums[block] = sum;
}

// A block for a problem.
template <class T>
__global__ void total_kernel(const __grid_constant__ TotalTasks<T> tasks) {
  CSDIV_SHARED(TotalShared, shared);
  const int64_t b = blockIdx.x;
  const Totals<T>& totals = tasks.totals;
  const Problem<T>& problem = tasks.rows.tasks[0].problem;
  double divergence = 0;   // what the terms leave out cancels
  for (int k = 0; k < tasks.rows.count; ++k) {
    const RowTask<T>& task = tasks.rows.tasks[k];
    const TotalParts& parts = tasks.parts[k];
    const int64_t item = k == 0 ? b : (k == 1 ? problem.p : problem.q).item(b), n = task.problem.p.n;
    Sum sum;
    if (parts.sums) {
      for (int64_t at = threadIdx.x; at < parts.blocks; at += kThreads) {
        const Sum rows = parts.sums[item * parts.blocks + at];
        sum.add(rows.max, rows.sum);
      }
      sum = add_threads(sum, shared);
    } else {
      sum = add_rows(task, item, 0, n, k == 0 && totals.row_lse ? totals.row_lse + b * n : nullptr, shared);
    }
    const double value = kLog2 * sum.log2_value();
    divergence += k == 0 ? -value : 0.5 * value;
    if (threadIdx.x == 0) totals.values[b * tasks.rows.count + k] = value + log_offset(task.problem, item, true);
  }
  if (totals.divergences && threadIdx.x == 0) totals.divergences[b] = T(divergence);
}

}   // namespace

template <class T>
void total_rows(Context& context, const RowTasks<T>& tasks, const Totals<T>& totals) {
  TotalTasks<T> all{tasks, totals, {}};
  int64_t steps = 0, blocks = 0;
  for (int k = 0; k < tasks.count; ++k) {
    const RowPartials<T>& partials = tasks.tasks[k].partials;
    const int lanes = partials.lanes();
    TotalParts& parts = all.parts[k];
    parts.rows = kThreads / lanes;
    parts.blocks = partials.row_blocks(tasks.tasks[k].problem.p.n);
    blocks += tasks.tasks[k].problem.batch * parts.blocks;
    steps += parts.blocks * ceil_div(partials.parts, lanes);
  }
  if (steps > kStepsAtOnce) {
    for (int k = 0; k < tasks.count; ++k)
      all.parts[k].sums = context.take<Sum>(tasks.tasks[k].problem.batch * all.parts[k].blocks);
    launch(context, blocks, sizeof(TotalShared), add_rows_kernel<T>, all);
  }
  launch(context, tasks.tasks[0].problem.batch, sizeof(TotalShared), total_kernel<T>, all);
}

CSDIV_INSTANTIATE(total_rows);

}   // namespace csdiv::cuda
