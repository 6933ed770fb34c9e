#include "assign.h"
#include "cuda.h"
#include "full_pair.h"
#include "row_sums.h"

namespace csdiv::cuda {
namespace {

// Rows against columns, and what becomes of the logits; null: not that.
struct FullRows {
  Problem<double> problem;
  bool self = false;   // the upper triangle, whose pairs beside the diagonal count twice
  int64_t parts = 1;   // of the columns
  RowPartials<double> sums{};
  BestPartials<double> best{};
  double* values = nullptr;   // (batch, n, m)
};

// A warp for some rows and a part of their columns.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, kWidth < 32 ? 2 : 1)
    full_forward_kernel(const __grid_constant__ FullRows rows) {
  CSDIV_SHARED(FullShared<kWidth>, shared);
  using Pair = FullPair<kWidth>;
  constexpr int kRows = kWarpComponents<kWidth>;
  const Mixture<double>&p = rows.problem.p, &q = rows.problem.q;
  const int64_t dim = rows.problem.dim, tiles = ceil_div(p.n, kRows);
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int its_part = int(warp % rows.parts), tile = int(warp / rows.parts % tiles),
            b = int(warp / rows.parts / tiles);
  if (b >= rows.problem.batch) return;
  const int row = tile * kRows + int(threadIdx.x) % kWarp / Pair::kLanes;
  const int64_t i = p.item(b) * p.n + (row < p.n ? row : p.n - 1), item = q.item(b);
  Pair pair(int(dim), p.means + i * dim, p.variances + i * dim * dim, shared.own());
  const bool writes = row < p.n && threadIdx.x % Pair::kLanes == 0;
  const int first = rows.self ? tile * kRows : 0;
  const Part columns = part(q.n - first, rows.parts, its_part);
  LogSum<double, double> sum;
  Best<double> best;
#pragma unroll 1
  for (int j = first + columns.begin; j < first + columns.end; ++j) {
    const int64_t k = item * q.n + j;
    double logit = log2_weight(q, item, j);
    if (counts(logit)) logit += pair.log2_density(q.means + k * dim, q.variances + k * dim * dim, false);
    if (rows.self) logit = j < row ? -INFINITY : j == row ? logit : logit + 1;
    if (rows.values) {
      if (writes) rows.values[(b * p.n + row) * q.n + j] = kLog2 * logit;
    } else if (rows.best.logits) {
      best.add(logit, j);
    } else {
      sum.add(fmin(logit, DBL_MAX), logit == logit ? 1 : logit);
    }
  }
  if (!writes) return;
  const int64_t at = (b * rows.parts + its_part) * p.n + row;
  if (rows.sums.sums) {
    rows.sums.maxima[at] = sum.max;
    rows.sums.sums[at] = sum.sum;
  }
  if (rows.best.logits) {
    rows.best.logits[at] = best.logit;
    rows.best.indices[at] = best.index;
  }
}

__global__ void full_rows_kernel(int64_t size, int64_t n, RowPartials<double> sums, double* row_lse) {
  const int64_t row = sums.row_of_thread();
  if (row >= size) return;
  const double value = kLog2 * sums.row(row / n, n, row % n).log2_value();
  if (sums.lane() == 0) row_lse[row] = value;
}

void run(const Context& context, const FullRows& rows) {
  with_width(rows.problem.dim, [&](auto width) {
    const int64_t tiles = rows.problem.batch * ceil_div(rows.problem.p.n, kWarpComponents<width()>);
    launch(context, ceil_div(tiles * rows.parts, kWarps), sizeof(FullShared<width()>), full_forward_kernel<width()>,
           rows);
  });
}

int64_t parts_of(const Context& context, const Problem<double>& problem) {
  int64_t parts = 1;
  with_width(problem.dim, [&](auto width) {
    const int64_t tiles = problem.batch * ceil_div(problem.p.n, kWarpComponents<width()>);
    parts = choose_parts(context.processors, tiles, problem.q.n);
  });
  return parts;
}

}   // namespace

void full_overlap_lse_forward(Context& context, const Problem<double>& problem, bool self, double* row_lse) {
  const int64_t size = problem.batch * problem.p.n, parts = parts_of(context, problem);
  FullRows task{problem, self, parts};
  task.sums = {context.take<double>(size * parts), context.take<double>(size * parts), int(parts)};
  run(context, task);
  launch(context, task.sums.row_blocks(size), 0, full_rows_kernel, size, problem.p.n, task.sums, row_lse);
}

void full_pairwise_forward(Context& context, const Problem<double>& problem, double* values) {
  FullRows task{problem, false, parts_of(context, problem)};
  task.values = values;
  context.take<double>(1);   // a call without scratch memory launches nothing
  run(context, task);
}

void full_assign(Context& context, const Problem<double>& problem, int64_t* assignment) {
  const int64_t size = problem.batch * problem.p.n, parts = parts_of(context, problem);
  FullRows task{problem, false, parts};
  task.best = {context.take<double>(size * parts), context.take<int64_t>(size * parts), parts};
  run(context, task);
  combine_best(context, problem.batch, problem.p.n, task.best, assignment);
}

}   // namespace csdiv::cuda
