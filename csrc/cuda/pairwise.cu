#include "gradient_sweep.h"
#include "pack.h"

namespace csdiv::cuda {
namespace {

template <class T>
struct PairwiseShared {
  LogitShared<T> logits;
  TileWalk walk;
};

// A block for a tile of pairs.
template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) pairwise_forward_kernel(Problem<T> problem, T* values) {
  CSDIV_SHARED(PairwiseShared<T>, shared);
  const int64_t n = problem.p.n, m = problem.q.n;
  const int columns = int(column_tiles(problem)), rows = int(problem.p.tiles());
  const int b = int(blockIdx.x) / columns / rows;
  const int row_tile = int(blockIdx.x) / columns % rows, column_tile = int(blockIdx.x) % columns;
  shared.walk.begin({b, int(problem.p.item(b)), int(problem.q.item(b))}, {row_tile, row_tile + 1},
                    {column_tile, column_tile + 1});
  shared.walk.next();
  const TileIndex& tile = shared.walk.tile;
  Logits<T> logits;
  bool rows_kept = false;
  tile_logits(problem, tile, rows_kept, shared.logits, logits);
  const double reference = problem.scale.references[problem.scale.item(tile.problem)];
  const T offset = T(-0.5 * (kLog2 * reference + double(problem.dim) * kLog2Pi));
  const int64_t row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
  const int64_t column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c)
      if (row + a < n && column + c < m)
        values[(tile.problem * n + row + a) * m + column + c] = logits[a][c] * T(kLog2) + offset;
  }
}

}   // namespace

template <class T>
void pairwise_forward(Context& context, Problem<T> problem, T* values) {
  pack(context, problem);
  const int64_t blocks = problem.batch * problem.p.tiles() * column_tiles(problem);
  launch(context, blocks, sizeof(PairwiseShared<T>), pairwise_forward_kernel<T>, problem, values);
}

template <class T>
void pairwise_backward(Context& context, Problem<T> problem, const T* grad_values, const SideGradients<T>& grad_p,
                       const SideGradients<T>& grad_q) {
  pack(context, problem);
  GradientTasks<T> tasks{{{problem, false, Weights::kGiven, nullptr, grad_values}}, 1};
  sweep_pair<T>(context, tasks, nullptr, grad_p, grad_q);
}

CSDIV_INSTANTIATE(pairwise_forward);
CSDIV_INSTANTIATE(pairwise_backward);

}   // namespace csdiv::cuda
