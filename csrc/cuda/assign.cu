#include "assign.h"

#include "cuda.h"
#include "pack.h"
#include "tile_logits.h"

namespace csdiv::cuda {
namespace {

constexpr int kBlocksPerProcessor = 24;

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    assign_kernel(Problem<T> problem, BestPartials<T> partials) {
  CSDIV_SHARED(LogitShared<T>, shared);
  const int64_t n = problem.p.n, parts = partials.parts;
  const int b = int(blockIdx.x / parts / problem.p.tiles());
  TileIndex tile{b, int(problem.p.item(b)), int(problem.q.item(b)), int(blockIdx.x / parts % problem.p.tiles()), 0};
  const Part columns = part(column_tiles(problem), parts, blockIdx.x % parts);
  Best<T> best[kThreadRows];
  bool rows_kept = false;
  for (tile.column_tile = columns.begin; tile.column_tile < columns.end; ++tile.column_tile) {
    Logits<T> logits;
    tile_logits(problem, tile, rows_kept, shared, logits);
    const int64_t column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
      for (int c = 0; c < kThreadColumns<T>; ++c) best[a].add(logits[a][c], column + c);
    }
  }
  const int64_t row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
    for (int step = kColumnThreads / 2; step; step /= 2) {
      const T logit = __shfl_xor_sync(~0u, best[a].logit, step);
      const int64_t index = __shfl_xor_sync(~0u, best[a].index, step);
      best[a].add(logit, index);
    }
    if (threadIdx.x % kColumnThreads == 0 && row + a < n) {
      const int64_t at = (b * parts + blockIdx.x % parts) * n + row + a;
      partials.logits[at] = best[a].logit;
      partials.indices[at] = best[a].index;
    }
  }
}

template <class T>
__global__ void combine_best_kernel(int64_t rows, int64_t n, BestPartials<T> partials, int64_t* assignment) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  Best<T> best;
  for (int64_t k = 0; k < partials.parts; ++k) {
    const int64_t at = (row / n * partials.parts + k) * n + row % n;
    best.add(partials.logits[at], partials.indices[at]);
  }
  assignment[row] = best.index;
}

}   // namespace

template <class T>
void combine_best(const Context& context, int64_t problems, int64_t n, const BestPartials<T>& partials,
                  int64_t* assignment) {
  const int64_t rows = problems * n;
  launch(context, ceil_div(rows, kThreads), 0, combine_best_kernel<T>, rows, n, partials, assignment);
}

template <class T>
void assign(Context& context, Problem<T> problem, int64_t* assignment) {
  pack(context, problem);
  const int64_t rows = problem.batch * problem.p.n, row_tiles = problem.batch * problem.p.tiles();
  const int64_t wanted = ceil_div(int64_t(context.processors) * kBlocksPerProcessor, row_tiles > 0 ? row_tiles : 1);
  const int64_t columns = column_tiles(problem), parts = wanted < columns ? wanted : columns;
  const BestPartials<T> partials{context.take<T>(rows * parts), context.take<int64_t>(rows * parts), parts};
  launch(context, row_tiles * parts, sizeof(LogitShared<T>), assign_kernel<T>, problem, partials);
  combine_best(context, problem.batch, problem.p.n, partials, assignment);
}

CSDIV_INSTANTIATE(combine_best);
CSDIV_INSTANTIATE(assign);

}   // namespace csdiv::cuda
