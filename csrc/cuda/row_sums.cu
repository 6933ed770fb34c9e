#include "row_sums.h"

namespace csdiv::cuda {
namespace {

template <class T>
struct RowShared {
  LogitShared<T> logits;
  FlushedRows<T> flushed;
  TileWalk walk;
  int task, part;
};

// Which task, row tile and part of the columns the block has.
template <class T>
CSDIV_DEVICE void begin_rows(const RowTasks<T>& tasks, RowShared<T>& shared) {
  int k = 0;
  int64_t block = blockIdx.x;
  while (block >= tasks.tasks[k].blocks) block -= tasks.tasks[k++].blocks;
  const Problem<T>& problem = tasks.tasks[k].problem;
  const RowBlock rows = tasks.tasks[k].block(block);
  if (threadIdx.x == 0) shared.task = k, shared.part = rows.part;
  shared.walk.begin({rows.problem, int(problem.p.item(rows.problem)), int(problem.q.item(rows.problem))},
                    {rows.row_tile, rows.row_tile + 1}, rows.columns);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    overlap_lse_forward_kernel(const __grid_constant__ RowTasks<T> tasks) {
  CSDIV_SHARED(RowShared<T>, shared);
  begin_rows(tasks, shared);
  const TileIndex& tile = shared.walk.tile;
  RowSums<T> sums;
  shared.flushed[threadIdx.x] = LogSum<T, double>();
  bool rows_kept = false;
  while (shared.walk.next()) {
    const RowTask<T>& task = tasks.tasks[shared.task];
    Logits<T> logits;
    tile_logits<true>(task.problem, tile, rows_kept, shared.logits, logits);
    if (task.self) {
      const int64_t row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
      const int64_t column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
      for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
        for (int b = 0; b < kThreadColumns<T>; ++b) logits[a][b] = upper_triangle(logits[a][b], row + a, column + b);
      }
    }
    sums.add(logits, shared.flushed);
  }
  sums.flush(shared.flushed);
  const RowTask<T>& task = tasks.tasks[shared.task];
  const int64_t n = task.problem.p.n, row_tile = shared.walk.row_end - 1;
  const int64_t row = row_tile * kTile + threadIdx.x / kColumnThreads * kThreadRows + threadIdx.x % kColumnThreads;
  if (threadIdx.x % kColumnThreads < kThreadRows && row < n) {
    const int64_t at = (tile.problem * task.partials.parts + shared.part) * n + row;
    task.partials.maxima[at] = shared.flushed[threadIdx.x].max;
    task.partials.sums[at] = shared.flushed[threadIdx.x].sum;
  }
}

}   // namespace

template <class T>
void sum_rows(Context& context, RowTasks<T>& tasks) {
  tasks.cut(context.processors);
  int64_t blocks = 0;
  for (int k = 0; k < tasks.count; ++k) {
    RowTask<T>& task = tasks.tasks[k];
    const int64_t size = task.problem.batch * task.partials.parts * task.problem.p.n;
    task.partials.maxima = context.take<T>(size);
    task.partials.sums = context.take<double>(size);
    blocks += task.blocks;
  }
  launch(context, blocks, sizeof(RowShared<T>), overlap_lse_forward_kernel<T>, tasks);
}

CSDIV_INSTANTIATE(sum_rows);

}   // namespace csdiv::cuda
