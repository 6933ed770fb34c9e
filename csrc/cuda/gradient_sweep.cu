#include "gradient_sweep.h"

namespace csdiv::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp, kWarpRows = kTile / kWarps;

// kLanes lanes have a dimension each; groups of them share the rows of a warp.
template <int kLanes>
constexpr int kGroups = kWarp / kLanes;
template <int kLanes>
constexpr int kLaneRows = kWarpRows / kGroups<kLanes>;

template <class T>
struct SweepShared {
  alignas(16) T weights[kColumns<T>][kTile];
  T columns[2][kColumns<T>][kWarp];   // means and variances, (kColumns, kLanes)
  T sums[2][kColumns<T>][kWarp];      // likewise
};

// The blocks' own sums, where they go.
struct TileSums {
  double* rows;                // of the tile's first row; null: not wanted
  double* columns;             // of its first column
  int num_rows, num_columns;   // that exist
};

template <class T>
struct GradientShared {
  union {
    LogitShared<T> logits;
    SweepShared<T> sweep;
  };
  TileSums sums;
  TileWalk walk;
  int task, row_copy, column_copy;
};

// As a thread has them of a tile: in registers first.
template <class T>
using TileWeights = Logits<T>;

// From logits to the pairs' shares, times the gradient of the row where there is one; zero where the sum is infinite.
template <class T>
CSDIV_DEVICE void shares(const GradientTask<T>& task, const TileIndex& tile, TileWeights<T>& weights) {
  const Problem<T>& problem = task.problem;
  const bool of_total = task.weights == Weights::kOfTotal;
  const int64_t first_row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
  const int64_t first_column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
  const double offset = log_offset(problem, tile.problem, of_total);
  const T total = of_total ? T((task.value(tile.problem) - offset) * kLog2E) : T(0);
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
    const int64_t i = first_row + a, row = tile.problem * problem.p.n + i;
    T shift = -T(INFINITY), factor = 1;   // the infinity: a row that counts nothing
    if (of_total) {
      const T log_weight = problem.p.log2_weights[tile.p_item * problem.p.tiles() * kTile + i];
      shift = log_weight - total;
      if (!counts(log_weight) || isinf(total)) factor = 0;
    } else {
      factor = i < problem.p.n && !isinf(task.row_lse[row]) ? task.given[row] : T(0);
      if (factor != 0) shift = T((offset - task.row_lse[row]) * kLog2E);
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c) {
      T& weight = weights[a][c];
      const T logit = task.self ? upper_triangle(weight, i, first_column + c) : weight;
      weight = factor == 0 || logit == -T(INFINITY) ? T(0) : factor * approximate_exp2(logit + shift);
    }
  }
}

// Whether weights are given and no logit of the tile can be infinite, so that none is needed.
template <class T>
CSDIV_DEVICE bool needs_no_logits(const GradientTask<T>& task, const TileIndex& tile) {
  bool result = task.weights == Weights::kGiven;
  for (int k = 0; result && k < flags_per_tile(task.problem.dim); ++k) result = certified(task.problem, tile, k);
  return result;
}

// The gradients of pairs; those of components too far apart, or of points at one place, count nothing.
template <class T>
CSDIV_DEVICE void given_weights(const GradientTask<T>& task, const TileIndex& tile, TileWeights<T>& weights) {
  const Problem<T>& problem = task.problem;
  const bool plain = needs_no_logits(task, tile);
  const int64_t n = problem.p.n, m = problem.q.n;
  const int64_t first_row = tile.first_row() + threadIdx.x / kColumnThreads * kThreadRows;
  const int64_t first_column = tile.first_column<T>() + threadIdx.x % kColumnThreads * kThreadColumns<T>;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c) {
      const int64_t i = first_row + a, j = first_column + c;
      const bool counts = i < n && j < m && (plain || !isinf(weights[a][c]));
      weights[a][c] = counts ? task.given[(tile.problem * n + i) * m + j] : T(0);
    }
  }
}

// The tile's weights into shared memory; returns whether any is not zero.
template <class T>
CSDIV_DEVICE bool tile_weights(const GradientTask<T>& task, const TileIndex& tile, GradientShared<T>& shared) {
  TileWeights<T> weights;
  bool rows_kept = false;
  if (!needs_no_logits(task, tile)) tile_logits(task.problem, tile, rows_kept, shared.logits, weights);
  if (task.weights == Weights::kGiven)
    given_weights(task, tile, weights);
  else
    shares(task, tile, weights);
  const int row = threadIdx.x / kColumnThreads * kThreadRows;
  const int column = threadIdx.x % kColumnThreads * kThreadColumns<T>;
  bool any = false;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
    for (int c = 0; c < kThreadColumns<T>; ++c) any |= weights[a][c] != 0;
  }
  any = __syncthreads_or(any);   // nobody reads logits any more
#pragma unroll
  for (int c = 0; c < kThreadColumns<T>; ++c) {
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) shared.sweep.weights[column + c][row + a] = weights[a][c];
  }
  __syncthreads();
  return any;
}

// Scaled means and variances of kCount components of a packed tile in dimension d; padding beyond the dimensions.
template <int kCount, class T>
CSDIV_DEVICE void read_packed(const Mixture<T>& side, int64_t dim, int64_t tile, int component, int64_t d,
                              T (&means)[kCount], T (&variances)[kCount]) {
  const int64_t padded = padded_dim(dim);
  if (d < padded) {
    const T* const values = side.values + (tile * padded + d) * 2 * kTile + component;
    load(values, means);
    load(values + kTile, variances);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) means[k] = 0, variances[k] = T(0.5);
  }
}

// One chunk of kLanes dimensions from `begin` on: every warp has kWarpRows rows, in registers, and goes through the
// columns; in each of kWarps phases it has a part of them to itself.
template <int kLanes, bool kFast, class T>
CSDIV_DEVICE void sweep(const Problem<T>& problem, const TileIndex& tile, int64_t begin, const TileSums& sums,
                        SweepShared<T>& shared) {
  constexpr int kRows = kLaneRows<kLanes>, kVector = 16 / sizeof(T);
  constexpr int kPhaseColumns = kColumns<T> / kWarps, kStepColumns = kPhaseColumns / kGroups<kLanes>;
  const int dd = threadIdx.x % kLanes, group = threadIdx.x % kWarp / kLanes, warp = threadIdx.x / kWarp;
  const int row = warp * kWarpRows + group * kRows;
  const int64_t dim = problem.dim, d = begin + dd, first_column = tile.first_column<T>();
  T* const columns = &shared.columns[0][0][0];
  T* const column_sums = &shared.sums[0][0][0];
  constexpr int kVariances = kColumns<T> * kLanes;   // from means to variances

  T means[kRows], variances[kRows], mean_sums[kRows] = {}, variance_sums[kRows] = {};
  if constexpr (kFast) {
    read_packed(problem.p, dim, tile.p_item * problem.p.tiles() + tile.row_tile, row, d, means, variances);
    for (int e = threadIdx.x / kLanes * kVector; e < kColumns<T>; e += kThreads / kLanes * kVector) {
      T packed_means[kVector], packed_variances[kVector];
      read_packed(problem.q, dim, tile.q_item * problem.q.tiles() + first_column / kTile, int(first_column % kTile) + e,
                  d, packed_means, packed_variances);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        columns[(e + k) * kLanes + dd] = packed_means[k];
        columns[kVariances + (e + k) * kLanes + dd] = packed_variances[k];
      }
    }
  } else {
    for (int r = 0; r < kRows; ++r)
      read_component(problem.p, dim, tile.p_item, tile.first_row() + row + r, d, means[r], variances[r]);
    for (int j = threadIdx.x / kLanes; j < kColumns<T>; j += kThreads / kLanes)
      read_component(problem.q, dim, tile.q_item, first_column + j, d, columns[j * kLanes + dd],
                     columns[kVariances + j * kLanes + dd]);
  }
  for (int e = threadIdx.x; e < 2 * kVariances; e += kThreads) column_sums[e] = 0;
  __syncthreads();

  for (int phase = 0; phase < kWarps; ++phase) {
    for (int step = 0; step < kGroups<kLanes>; ++step) {
      const int first = (warp + phase) % kWarps * kPhaseColumns + (step + group) % kGroups<kLanes> * kStepColumns;
#pragma unroll kFast ? 4 : 1
      for (int j = first; j < first + kStepColumns; ++j) {
        const T column_mean = columns[j * kLanes + dd], column_variance = columns[kVariances + j * kLanes + dd];
        T weights[kRows], mean_sum = 0, variance_sum = 0;
        load(shared.weights[j] + row, weights);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T delta = means[r] - column_mean, c = variances[r] + column_variance;
          if constexpr (kFast) {
            const PairGradient<T> gradient = pair_gradient(delta, c);
            mean_sums[r] += weights[r] * gradient.mean;
            variance_sums[r] += weights[r] * gradient.variance;
            mean_sum += weights[r] * gradient.mean;
            variance_sum += weights[r] * gradient.variance;
          } else {
            const PairGradient<T> gradient = exact_pair_gradient(weights[r], delta, c);
            mean_sums[r] += gradient.mean;
            variance_sums[r] += gradient.variance;
            mean_sum += gradient.mean;
            variance_sum += gradient.variance;
          }
        }
        column_sums[j * kLanes + dd] += mean_sum;
        column_sums[kVariances + j * kLanes + dd] += variance_sum;
      }
      if constexpr (kGroups<kLanes> > 1) __syncwarp();
    }
    __syncthreads();
  }

  // From the scaled dimension to the caller's.
  if (d < dim) {
    const int64_t scale = problem.scale.item(tile.problem) * padded_dim(dim) + d;
    const double unit = kFast ? ldexp(1.0, problem.scale.exponents[scale]) : 1.0;
    const auto add = [&](double* component, T mean_sum, T variance_sum) {
      component[d] += unit * double(mean_sum);
      component[dim + d] += unit * unit * double(variance_sum);
    };
    if (sums.rows)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (row + r < sums.num_rows) add(sums.rows + (row + r) * (2 * dim + 1), mean_sums[r], variance_sums[r]);
    if (sums.columns)
      for (int j = threadIdx.x / kLanes; j < kColumns<T>; j += kThreads / kLanes)
        if (j < sums.num_columns)
          add(sums.columns + j * (2 * dim + 1), column_sums[j * kLanes + dd],
              column_sums[kVariances + j * kLanes + dd]);
  }
  __syncthreads();
}

// sum_j w and sum_i w.
template <class T>
CSDIV_DEVICE void sum_weights(const SweepShared<T>& shared, int64_t dim, const TileSums& sums) {
  T sum = 0;
  if (threadIdx.x < kTile) {
    const int row = threadIdx.x;
    if (!sums.rows || row >= sums.num_rows) return;
    for (int j = 0; j < kColumns<T>; ++j) sum += shared.weights[j][row];
    sums.rows[row * (2 * dim + 1) + 2 * dim] += double(sum);
  } else {
    const int column = threadIdx.x - kTile;
    if (!sums.columns || column >= kColumns<T> || column >= sums.num_columns) return;
    for (int i = 0; i < kTile; ++i) sum += shared.weights[column][(i + column) % kTile];   // no bank conflicts
    sums.columns[column * (2 * dim + 1) + 2 * dim] += double(sum);
  }
}

// Of the kTile components from `first` on.
CSDIV_DEVICE int existing(int64_t n, int64_t first) {
  return int(n - first < kTile ? n - first : kTile);
}

template <class T>
CSDIV_DEVICE TileSums tile_sums(const GradientTask<T>& task, const TileIndex& tile, int row_copy, int column_copy) {
  const int64_t dim = task.problem.dim, n = task.problem.p.n, m = task.problem.q.n;
  const int64_t first_row = tile.first_row(), first_column = tile.first_column<T>();
  TileSums sums{nullptr, nullptr, existing(n, first_row), existing(m, first_column)};
  if (task.rows_wanted) sums.rows = task.row_sums.of(tile.problem, row_copy, n, first_row, dim);
  if (task.columns_wanted) sums.columns = task.column_sums.of(tile.problem, column_copy, m, first_column, dim);
  return sums;
}

template <int kLanes, class T>
CSDIV_DEVICE void sweep_tile(const GradientTask<T>& task, GradientShared<T>& shared) {
  const TileIndex& tile = shared.walk.tile;
  if (threadIdx.x == 0) shared.sums = tile_sums(task, tile, shared.row_copy, shared.column_copy);
  __syncthreads();
  const Problem<T>& problem = task.problem;
  sum_weights(shared.sweep, problem.dim, shared.sums);
  for (int64_t begin = 0; begin < problem.dim; begin += kLanes) {
    if (certified(problem, tile, begin / kFlagDims))
      sweep<kLanes, true>(problem, tile, begin, shared.sums, shared.sweep);
    else
      sweep<kLanes, false>(problem, tile, begin, shared.sums, shared.sweep);
  }
}

// The sums of `count` components from `first` on, which are the block's own, are set to zero.
CSDIV_DEVICE void clear(const ComponentSums& sums, int problem, int copy, int64_t n, int64_t first, int64_t count,
                        int64_t dim) {
  double* const own = sums.of(problem, copy, n, first, dim);
  const int64_t size = (count < n - first ? count : n - first) * (2 * dim + 1);
  for (int64_t e = threadIdx.x; e < size; e += kThreads) own[e] = 0;
}

// Which task, problem and tiles the block has.
template <class T>
CSDIV_DEVICE void begin_sweep(const GradientTasks<T>& tasks, GradientShared<T>& shared) {
  int k = 0, block = blockIdx.x;
  while (block >= tasks.tasks[k].blocks) block -= int(tasks.tasks[k++].blocks);
  const GradientTask<T>& task = tasks.tasks[k];
  const Mixture<T>&p = task.problem.p, &q = task.problem.q;
  const Partition& partition = task.partition;
  const int row_copy = block % partition.row_copies(),
            row_range = block / partition.row_copies() % partition.row_ranges;
  const int column_copy = row_range / partition.phases, b = block / partition.blocks();
  const int column_range =
      row_copy * partition.phases + (tasks.phase + partition.phases - row_range % partition.phases) % partition.phases;
  if (threadIdx.x == 0) shared.task = k, shared.row_copy = row_copy, shared.column_copy = column_copy;
  const Part rows = part(p.tiles(), partition.row_ranges, row_range);
  const Part columns = part(column_tiles(task.problem), partition.column_ranges, column_range);
  const bool any = columns.begin < columns.end;   // else there are more ranges than tiles
  shared.walk.begin({b, int(p.item(b)), int(q.item(b))}, {rows.begin, any ? rows.end : rows.begin}, columns);
  if (tasks.phase > 0) return;   // the sums were cleared in the first
  const int64_t dim = task.problem.dim, first_row = int64_t(rows.begin) * kTile, num_rows = rows.end - rows.begin;
  const int64_t first_column = int64_t(columns.begin) * kColumns<T>, num_columns = columns.end - columns.begin;
  if (task.rows_wanted) clear(task.row_sums, b, row_copy, p.n, first_row, num_rows * kTile, dim);
  if (task.columns_wanted) clear(task.column_sums, b, column_copy, q.n, first_column, num_columns * kColumns<T>, dim);
}

template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    overlap_lse_backward_kernel(const __grid_constant__ GradientTasks<T> tasks) {
  CSDIV_SHARED(GradientShared<T>, shared);
  begin_sweep(tasks, shared);
  const TileIndex& tile = shared.walk.tile;
  while (shared.walk.next()) {
    const GradientTask<T>& task = tasks.tasks[shared.task];
    if (task.self && tile.first_column<T>() + kColumns<T> <= tile.first_row()) continue;   // below the diagonal
    if (!tile_weights(task, tile, shared)) continue;
    sweep_tile<kLanes>(task, shared);
  }
}

// Instructions that a dimension costs where lanes are in groups of `lanes`, those of idle lanes included; the figures
// are those that bench/static.py counts.
inline double cost(int64_t dim, int lanes) {
  return double(ceil_div(dim, lanes) * lanes) * (9.2 + 42.0 / lanes);
}

// Pairs of tiles that a task's problems have each.
template <class T>
double tiles_of(const GradientTask<T>& task) {
  return double(task.problem.p.tiles()) * double(column_tiles(task.problem));
}

// Cuts all tasks for `processors`, each with blocks in proportion to its pairs; the bytes that their sums take. Half of
// the blocks of a mixture with itself have nothing to do.
template <class T>
double partition_tasks(GradientTasks<T>& tasks, int processors, int phases) {
  double pairs = 0, bytes = 0;
  for (int k = 0; k < tasks.count; ++k)
    pairs += double(tasks.tasks[k].problem.batch) * tiles_of(tasks.tasks[k]) * (tasks.tasks[k].self ? 0.5 : 1);
  for (int k = 0; k < tasks.count; ++k) {
    GradientTask<T>& task = tasks.tasks[k];
    const Problem<T>& problem = task.problem;
    const bool any = problem.batch > 0 && problem.p.n > 0;
    const double wanted = any ? processors * kBlocksPerProcessor * tiles_of(task) / pairs : 1;
    task.partition = choose_partition(problem, wanted, phases, task.rows_wanted, task.columns_wanted);
    task.blocks = any ? problem.batch * task.partition.blocks() : 0;
    const double rows = task.rows_wanted ? double(task.partition.row_copies()) * double(problem.p.n) : 0;
    const double columns = task.columns_wanted ? double(task.partition.column_copies()) * double(problem.q.n) : 0;
    bytes += double(problem.batch) * (rows + columns) * double(2 * problem.dim + 1) * sizeof(double);
  }
  return bytes;
}

// How many phases: one, unless the sums took too much memory; then as many as leave blocks enough tiles at a time, and
// enough blocks.
template <class T>
int choose_phases(GradientTasks<T>& tasks, int processors) {
  if (partition_tasks(tasks, processors, 1) <= double(processors) * kSumBytesPerProcessor) return 1;
  const auto count_blocks = [&] {
    int64_t blocks = 0;
    for (int k = 0; k < tasks.count; ++k) blocks += tasks.tasks[k].blocks;
    return blocks;
  };
  double tiles = 0;
  for (int k = 0; k < tasks.count; ++k) tiles += double(tasks.tasks[k].problem.batch) * tiles_of(tasks.tasks[k]);
  const int64_t once = count_blocks();
  int phases = int(std::min(double(once), tiles / (double(once) * kTilesPerPhase)));
  for (; phases > 1; --phases) {
    partition_tasks(tasks, processors, phases);
    if (10 * count_blocks() >= 9 * once) break;
  }
  return std::max(phases, 1);
}

}   // namespace

template <class T>
void sweep_gradients(Context& context, GradientTasks<T>& tasks) {
  const int phases = choose_phases(tasks, context.processors);
  partition_tasks(tasks, context.processors, phases);
  int64_t blocks = 0;
  for (int k = 0; k < tasks.count; ++k) {
    GradientTask<T>& task = tasks.tasks[k];
    const int64_t batch = task.problem.batch, n = task.problem.p.n, m = task.problem.q.n;
    const int64_t width = 2 * task.problem.dim + 1;
    task.row_sums.copies = task.partition.row_copies();
    task.column_sums.copies = n > 0 ? task.partition.column_copies() : 0;   // no block, nothing to add up
    task.row_sums.sums = context.take<double>(task.rows_wanted ? batch * task.row_sums.copies * n * width : 0);
    task.column_sums.sums = context.take<double>(task.columns_wanted ? batch * task.column_sums.copies * m * width : 0);
    blocks += task.blocks;
  }
  const int64_t dim = tasks.tasks[0].problem.dim, shared_bytes = sizeof(GradientShared<T>);
  for (tasks.phase = 0; tasks.phase < phases; ++tasks.phase) {
    if (cost(dim, 32) <= cost(dim, 16) && cost(dim, 32) <= cost(dim, 8))
      launch(context, blocks, shared_bytes, overlap_lse_backward_kernel<T, 32>, tasks);
    else if (cost(dim, 16) <= cost(dim, 8))
      launch(context, blocks, shared_bytes, overlap_lse_backward_kernel<T, 16>, tasks);
    else
      launch(context, blocks, shared_bytes, overlap_lse_backward_kernel<T, 8>, tasks);
  }
}

CSDIV_INSTANTIATE(sweep_gradients);

}   // namespace csdiv::cuda
