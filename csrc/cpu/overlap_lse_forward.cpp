#include "cpu.h"
#include "dispatch.h"
#include "row_sums.h"
#include "thread_pool.h"

namespace csdiv::cpu {

template <class T>
void overlap_lse_forward(const Problem<T>& batched, T* rows, int threads) {
  const Problem<T> problem = flattened(batched);
  threads = useful_threads(problem, threads);
  const PackedColumns<T> columns(problem, LogWeights::kKept, threads);
  const int64_t tiles = num_row_tiles(problem), groups = choose_partition(problem, columns, true, true).column_groups;
  RowSums<T> sums(problem, groups);

  parallel_for(problem.batch * tiles * groups, threads, [&](int64_t task) {
    const int64_t group = task % groups, tile = task / groups % tiles, b = task / groups / tiles;
    const RowTile<T> tile_rows = row_tile(problem, b, tile);
    T* const logits = scratch<T>(kTileRows * columns.stride());
    const Part stripes = part(columns.stripes(), groups, group);
    double maxima[kTileRows];
    for (int64_t s = stripes.begin; s < stripes.end; ++s)
      sums.add(tile_rows, columns.stripe(problem.q.item(b), s), b * problem.p.n + tile * kTileRows, group, logits,
               maxima);
  });
  sums.write(rows);
}

template void overlap_lse_forward(const Problem<float>&, float*, int);
template void overlap_lse_forward(const Problem<double>&, double*, int);

}   // namespace csdiv::cpu
