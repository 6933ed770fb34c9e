#include "cpu.h"
#include "dispatch.h"
#include "log_sum_exp.h"
#include "pack.h"
#include "thread_pool.h"

#include <algorithm>

namespace csdiv::cpu {
namespace {

constexpr int64_t kEnoughTasks = 64;   // with fewer row tiles the columns are cut as well

}   // namespace

template <class T>
void overlap_lse_forward(const Problem<T>& batched, T* rows, int threads) {
  const Problem<T> problem = flattened(batched);
  threads = useful_threads(problem, threads);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const PackedColumns<T> columns(problem, LogWeights::kKept, kStripeColumns, threads);
  const int64_t n = problem.p.n, tiles = problem.batch * num_row_tiles(problem), stripes = columns.stripes();
  const int64_t wanted_chunks = tiles > 0 ? ceil_div(kEnoughTasks, tiles) : 1;
  const int64_t chunk = std::max<int64_t>(1, ceil_div(stripes, wanted_chunks));
  const int64_t chunks = std::max<int64_t>(1, ceil_div(stripes, chunk));
  AlignedArray<LogSumExp> partial(problem.batch * n * chunks);

  parallel_for(tiles * chunks, threads, [&](int64_t task) {
    const int64_t c = task % chunks, b = task / chunks / num_row_tiles(problem);
    const int64_t tile = task / chunks % num_row_tiles(problem), item = problem.q.item(b);
    const RowTile<T> tile_rows = row_tile(problem, b, tile);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    LogSumExp sums[kTileRows];
    for (int64_t s = c * chunk; s < std::min(stripes, (c + 1) * chunk); ++s) {
      const Stripe<T>& stripe = columns.stripe(item, s);
      kernels.logits(tile_rows, stripe, 0, logits);
      for (int64_t r = 0; r < tile_rows.count; ++r) {
        const PartialSum<T> sum = kernels.partial_sum(logits + r * stripe.stride, stripe.padded);
        sums[r].add(sum.max, sum.sum);
      }
    }
    for (int64_t r = 0; r < tile_rows.count; ++r) partial.get()[(b * n + tile * kTileRows + r) * chunks + c] = sums[r];
  });

  for (int64_t row = 0; row < problem.batch * n; ++row) {
    LogSumExp total;
    for (int64_t c = 0; c < chunks; ++c) {
      const LogSumExp& part = partial.get()[row * chunks + c];
      total.add(part.max, part.sum);
    }
    rows[row] = T(total.value());
  }
}

template void overlap_lse_forward(const Problem<float>&, float*, int);
template void overlap_lse_forward(const Problem<double>&, double*, int);

}   // namespace csdiv::cpu
