#include <algorithm>
#include <limits>

#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/pack.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {

template <class T>
void assign(const Problem<T>& batched, int64_t* assignment, int threads) {
  const Problem<T> problem = flattened(batched);
  threads = useful_threads(problem, threads);
  const TileKernels<T>& kernels = tile_kernels<T>();
  const PackedColumns<T> columns(problem, LogWeights::kKept, threads);
  const int64_t tiles = num_row_tiles(problem);
  parallel_for(problem.batch * tiles, threads, [&](int64_t task) {
    const int64_t b = task / tiles, first = task % tiles * kTileRows;
    const RowTile<T> rows = row_tile(problem, b, task % tiles);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    T best[kTileRows];
    int64_t winner[kTileRows] = {};
    std::fill_n(best, kTileRows, -std::numeric_limits<T>::infinity());
    for (int64_t s = 0; s < columns.stripes(); ++s) {
      const Stripe<T>& stripe = columns.stripe(problem.q.item(b), s);
      interruption_point();
      kernels.logits(rows, stripe, 0, logits);
      for (int64_t r = 0; r < rows.count; ++r) {
        for (int64_t j = 0; j < stripe.count; ++j) {
          const T logit = logits[r * stripe.stride + j];
          if (logit <= best[r] || best[r] != best[r]) continue;   // the first NaN wins and stays, as in torch.argmax
          best[r] = logit;
          winner[r] = s * columns.width() + j;
        }
      }
    }
    std::copy_n(winner, rows.count, assignment + b * problem.p.n + first);
  });
}

CSDIV_INSTANTIATE(assign);

}   // namespace csdiv::cpu
