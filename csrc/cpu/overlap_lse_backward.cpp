#include "cpu/sweep/gradient_sweep.h"
#include "cpu/tiny.h"

namespace csdiv::cpu {
namespace {

template <class T>
void backward_by_tiles(const Problem<T>& batched, const T* grad_row_lse, const T* row_lse,
                       const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  const Problem<T> problem = flattened(batched);
  const TileKernels<T>& kernels = tile_kernels<T>();
  // w = grad_row_lse exp(logit - row_lse): equation (5), r being the softmax of the row.
  const auto fill = [&](const SweepTile<T>& tile, T* weights) {
    const int64_t first = tile.problem * problem.p.n + tile.first_row;
    kernels.logits(tile.rows, tile.columns, 0, weights);
    return kernels.weights(tile.rows, tile.columns, {row_lse + first, grad_row_lse + first}, weights, tile.column_sums,
                           tile.row_sums);
  };
  sweep_gradients(problem, LogWeights::kKept, grad_p, grad_q, threads, fill);
}

}   // namespace

template <class T>
void overlap_lse_backward(const Problem<T>& problem, const T* grad_row_lse, const T* row_lse,
                          const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  if (!has_tiny_rows(problem)) return backward_by_tiles(problem, grad_row_lse, row_lse, grad_p, grad_q, threads);
  for (const Part& part : tiny_rows<T>(problem, grad_row_lse, nullptr, grad_p, grad_q, threads))
    backward_by_tiles(slice(problem, part), grad_row_lse + part.begin, row_lse + part.begin,
                      slice(grad_p, part, 1, problem.dim), slice(grad_q, part, problem.q.n, problem.dim), threads);
}

CSDIV_INSTANTIATE(overlap_lse_backward);

}   // namespace csdiv::cpu
