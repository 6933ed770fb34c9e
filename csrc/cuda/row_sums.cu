#include "row_sums.h"

namespace csdiv::cuda {
namespace {

constexpr int kBlocksPerProcessor = 24;   // some waves of resident blocks, so that the last one is short
constexpr int64_t kTilesPerBlock = 4;     // at least, where a row has them

// The tiles of pairs of one block.
struct RowBlock {
  int problem, row_tile, part;
  Part columns;
};

template <class T>
CSDIV_DEVICE RowBlock row_block(const RowTask<T>& task, int64_t block) {
  const int64_t parts = task.partials.parts, tiles = task.problem.p.tiles();
  RowBlock result{int(block / parts / tiles), int(block / parts % tiles), int(block % parts), {}};
  const int first = task.self ? result.row_tile * (kTile / kColumns<T>) : 0;
  result.columns = part(ceil_div(task.problem.q.n, kColumns<T>) - first, parts, result.part);
  result.columns.begin += first;
  result.columns.end += first;
  return result;
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    overlap_lse_forward_kernel(const __grid_constant__ RowTasks<T> tasks) {
  CSDIV_SHARED(LogitShared<T>, shared);
  int k = 0;
  int64_t first_block = 0;
  while (blockIdx.x - first_block >= tasks.tasks[k].blocks) first_block += tasks.tasks[k++].blocks;
  const RowTask<T>& task = tasks.tasks[k];
  const Problem<T>& problem = task.problem;
  const RowBlock block = row_block(task, blockIdx.x - first_block);
  TileIndex tile{block.problem, int(problem.p.item(block.problem)), int(problem.q.item(block.problem)), block.row_tile,
                 0};
  const int64_t first_row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
  RowSums<T> sums;
  bool rows_kept = false;
  for (tile.column_tile = block.columns.begin; tile.column_tile < block.columns.end; ++tile.column_tile) {
    Logits<T> logits;
    tile_logits(problem, tile, rows_kept, shared, logits);
    if (task.self) {
      const int64_t column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
      for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
        for (int b = 0; b < kThreadColumns<T>; ++b)
          logits[a][b] = upper_triangle(logits[a][b], first_row + a, column + b);
      }
    }
    sums.add(logits);
  }
  sums.flush();
  const int64_t row = first_row + threadIdx.x % kColumnThreads;
  if (threadIdx.x % kColumnThreads < kThreadRows && row < problem.p.n) {
    const int64_t at = (block.problem * task.partials.parts + block.part) * problem.p.n + row;
    task.partials.maxima[at] = sums.flushed.max;
    task.partials.sums[at] = sums.flushed.sum;
  }
}

}   // namespace

template <class T>
void sum_rows(Context& context, RowTasks<T>& tasks) {
  int64_t row_tiles = 0, blocks = 0;
  for (int k = 0; k < tasks.count; ++k) row_tiles += tasks.tasks[k].problem.batch * tasks.tasks[k].problem.p.tiles();
  const int64_t wanted = ceil_div(int64_t(context.processors) * kBlocksPerProcessor, row_tiles > 0 ? row_tiles : 1);
  for (int k = 0; k < tasks.count; ++k) {
    RowTask<T>& task = tasks.tasks[k];
    const int64_t columns = ceil_div(task.problem.q.n, kColumns<T>), most = ceil_div(columns, kTilesPerBlock);
    const int64_t n = task.problem.p.n, parts = wanted < most ? wanted : most;
    task.partials.parts = parts;
    task.partials.maxima = context.take<T>(task.problem.batch * parts * n);
    task.partials.sums = context.take<double>(task.problem.batch * parts * n);
    task.blocks = task.problem.batch * task.problem.p.tiles() * parts;
    blocks += task.blocks;
  }
  launch(context, blocks, sizeof(LogitShared<T>), overlap_lse_forward_kernel<T>, tasks);
}

template void sum_rows(Context&, RowTasks<float>&);
template void sum_rows(Context&, RowTasks<double>&);

}   // namespace csdiv::cuda
