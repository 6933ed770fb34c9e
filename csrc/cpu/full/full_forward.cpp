#include <algorithm>
#include <limits>

#include "cpu/cpu.h"
#include "cpu/full/full_pack.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/log_sum_exp.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

// Calls use(row, group, first column, columns, logits) for every row of all problems and every chunk of its columns,
// chunks of one row and column group in order; of the upper triangle those that have a pair in it. The logits, in whole
// blocks, are for `use` to change.
template <class Use>
void for_each_row(const Problem<double>& problem, Pairs pairs, int64_t groups, int threads, const Use& use) {
  const PackedFullColumns columns(problem, threads);
  const FullKernels& kernels = full_kernels();
  const int64_t tiles = num_full_tiles(problem), record = record_size(problem.dim);
  parallel_for(problem.batch * tiles * groups, threads, [&](int64_t task) {
    const int64_t group = task % groups, tile = task / groups % tiles, b = task / groups / tiles;
    double* const logits = scratch<double>(kFullRows * (kFullColumns + record));
    const FullRows rows = full_rows(problem, b, tile, logits + kFullRows * kFullColumns);
    const Part chunks = part(columns.chunks(), groups, group);
    for (int64_t chunk = first_chunk(pairs, chunks, tile); chunk < chunks.end; ++chunk) {
      interruption_point();
      const FullColumns block = columns.chunk(problem.q.item(b), chunk);
      kernels.logits(rows, block, logits);
      for (int64_t r = 0; r < rows.count; ++r)
        use(b * problem.p.n + tile * kFullRows + r, group, chunk * kFullColumns, columns.columns(chunk),
            logits + r * block.blocks * kernels.lanes);
    }
  });
}

// `cut(row, first column, columns, logits)` changes logits before they are summed.
template <class Cut>
void sum_rows(const Problem<double>& problem, Pairs pairs, double* row_lse, int threads, const Cut& cut) {
  threads = useful_threads(problem, threads);
  const int64_t chunks = ceil_div(problem.q.n, kFullColumns);
  const int64_t groups = num_full_tiles(problem) < kCopies ? std::min(chunks, kCopies) : 1;
  PartialSums sums(problem.rows(), groups);
  const TileKernels<double>& kernels = tile_kernels<double>();
  const auto add = [&](int64_t row, int64_t group, int64_t first, int64_t columns, double* logits) {
    cut(row, first, columns, logits);
    const int64_t padded = ceil_div(columns, kernels.lanes) * kernels.lanes;
    PartialSum<double> sum;
    kernels.partial_sums(logits, 1, padded, padded, &sum);
    sums.at(row, group).add(sum.max, sum.sum);
  };
  for_each_row(problem, pairs, groups, threads, add);
  for (int64_t row = 0; row < problem.rows(); ++row) row_lse[row] = sums.value(row, row + 1);
}

}   // namespace

void full_overlap_lse_forward(const Problem<double>& problem, double* row_lse, int threads) {
  sum_rows(flattened(problem), Pairs::kAll, row_lse, threads, [](int64_t, int64_t, int64_t, double*) {});
}

void full_self_overlap_forward(const Problem<double>& problem, double* row_lse, int threads) {
  const auto cut = [&](int64_t row, int64_t first, int64_t columns, double* logits) {
    cut_to_upper_triangle(row % problem.p.n, first, columns, logits);
  };
  sum_rows(problem, Pairs::kUpperTriangle, row_lse, threads, cut);
}

void full_pairwise_forward(const Problem<double>& batched, double* values, int threads) {
  const Problem<double> problem = flattened(batched);
  const auto copy = [&](int64_t row, int64_t, int64_t first, int64_t columns, const double* logits) {
    std::copy_n(logits, columns, values + row * problem.q.n + first);
  };
  for_each_row(problem, Pairs::kAll, 1, useful_threads(problem, threads), copy);
}

void full_assign(const Problem<double>& batched, int64_t* assignment, int threads) {
  const Problem<double> problem = flattened(batched);
  const AlignedArray<double> best(problem.rows());
  std::fill_n(best.get(), best.size(), -std::numeric_limits<double>::infinity());
  std::fill_n(assignment, problem.rows(), 0);
  const auto take_larger = [&](int64_t row, int64_t, int64_t first, int64_t columns, const double* logits) {
    double& largest = best.get()[row];
    for (int64_t j = 0; j < columns; ++j) {
      if (logits[j] <= largest || largest != largest) continue;   // the first NaN wins and stays, as in torch.argmax
      largest = logits[j];
      assignment[row] = first + j;
    }
  };
  for_each_row(problem, Pairs::kAll, 1, useful_threads(problem, threads), take_larger);
}

}   // namespace csdiv::cpu
