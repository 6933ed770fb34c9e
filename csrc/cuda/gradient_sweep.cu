#include "gradient_sweep.h"

#include "pair_weights.h"

namespace csdiv::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp, kWarpRows = kTile / kWarps;

// kLanes lanes have a dimension each; groups of them share the rows of a warp.
template <int kLanes>
constexpr int kGroups = kWarp / kLanes;
template <int kLanes>
constexpr int kLaneRows = kWarpRows / kGroups<kLanes>;

// Columns are in sets, as many as a thread has of a tile. What is left free behind each set puts those of neighbouring
// threads into different banks.
template <class T>
struct SweepShared {
  alignas(16) T weights[kColumns<T> * (kTile + 1)];
  alignas(16) T columns[2 * kColumns<T> * kWarp];   // means, then variances, in kLanes dimensions
  alignas(16) T sums[2 * kColumns<T> * kWarp];      // likewise, of each lane

  // Where the rows of column j begin.
  CSDIV_DEVICE static constexpr int rows_of(int j) { return j * kTile + j / kThreadColumns<T> * kThreadColumns<T>; }

  // Where its dimensions begin.
  template <int kLanes>
  CSDIV_DEVICE static constexpr int lanes_of(int j) {
    return j * kLanes + (kLanes < kWarp ? j / kThreadColumns<T> * kLanes : 0);
  }
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
  RowShare<T> rows[kTile];
  TileWalk walk;
  int task, row_copy, column_copy;
  double reference;   // of the problem's logits
};

// Weights into shared memory; returns whether any of the block's is not zero.
template <class T>
CSDIV_DEVICE bool keep_weights(const TileWeights<T>& weights, SweepShared<T>& shared) {
  constexpr int kVector = 16 / sizeof(T);
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
    T* const to = shared.weights + shared.rows_of(column + c) + row;
#pragma unroll
    for (int a = 0; a < kThreadRows; a += kVector) {
      T vector[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) vector[k] = weights[a + k][c];
      store(to + a, vector);
    }
  }
  __syncthreads();
  return any;
}

template <class T>
CSDIV_DEVICE bool tile_weights(const GradientTask<T>& task, const TileIndex& tile, GradientShared<T>& shared) {
  TileWeights<T> weights;
  bool rows_kept = false;
  if (task.weights != Weights::kGiven) share_rows(task, tile, shared.reference, shared.rows);
  if (!needs_no_logits(task, tile)) tile_logits(task.problem, tile, rows_kept, shared.logits, weights);
  if (task.weights == Weights::kGiven) {   // to the end apart: merged weights took local memory
    given_weights(task, tile, weights);
    return keep_weights(weights, shared.sweep);
  }
  shares(task, tile, shared.rows, weights);
  return keep_weights(weights, shared.sweep);
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

template <class T>
CSDIV_DEVICE TileSums tile_sums(const GradientTask<T>& task, const GradientShared<T>& shared) {
  const TileIndex& tile = shared.walk.tile;
  const int64_t dim = task.problem.dim, n = task.problem.p.n, m = task.problem.q.n;
  const int64_t first_row = tile.first_row(), first_column = tile.first_column<T>();
  TileSums sums{nullptr, nullptr, existing(n, first_row), existing(m, first_column)};
  if (task.rows_wanted) sums.rows = task.row_sums.of(tile.problem, shared.row_copy, n, first_row, dim);
  if (task.columns_wanted) sums.columns = task.column_sums.of(tile.problem, shared.column_copy, m, first_column, dim);
  return sums;
}

// Adds the sums of kCount components, of which `existing` exist, to their float64 ones in dimension `d`; components are
// kStep apart. All are loaded before one is stored, so that they come in one round trip.
template <int kStep, int kCount, class T>
CSDIV_DEVICE void add_sums(double* sums, int first, int existing, int d, int dim, double unit,
                           const T (&mean_sums)[kCount], const T (&variance_sums)[kCount]) {
  forget(first), forget(dim);   // addresses are made here, not kept through the sweep
  const int64_t width = 2 * int64_t(dim) + 1;
  double* const own = sums + first * width + d;
  double means[kCount], variances[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const bool exists = first + k * kStep < existing;
    means[k] = exists ? own[k * kStep * width] : 0;
    variances[k] = exists ? own[k * kStep * width + dim] : 0;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (first + k * kStep >= existing) continue;
    own[k * kStep * width] = means[k] + unit * double(mean_sums[k]);
    own[k * kStep * width + dim] = variances[k] + unit * unit * double(variance_sums[k]);
  }
}

// One chunk of kLanes dimensions from `begin` on: every warp has kWarpRows rows, in registers, and goes through the
// columns; in each of kWarps phases it has a part of them to itself. Groups of lanes have sums of their own.
template <int kLanes, bool kFast, class T>
CSDIV_DEVICE void sweep(const GradientTask<T>& task, int64_t begin, GradientShared<T>& block) {
  constexpr int kRows = kLaneRows<kLanes>, kVector = 16 / sizeof(T), kPhaseColumns = kColumns<T> / kWarps;
  constexpr int kVariances = kColumns<T> * kWarp;   // from means to variances
  const Problem<T>& problem = task.problem;
  const TileIndex& tile = block.walk.tile;
  SweepShared<T>& shared = block.sweep;
  int thread = threadIdx.x;
  forget(thread);
  const int dd = thread % kLanes, lane = thread % kWarp, warp = thread / kWarp;
  const int row = warp * kWarpRows + lane / kLanes * kRows;
  int chunk = int(begin);
  forget(chunk);
  const int64_t dim = problem.dim, d = chunk + dd, first_column = tile.first_column<T>();
  T* const columns = shared.columns + dd;

  T means[kRows], variances[kRows], mean_sums[kRows] = {}, variance_sums[kRows] = {};
  if constexpr (kFast) {
    read_packed(problem.p, dim, tile.p_item * problem.p.tiles() + tile.row_tile, row, d, means, variances);
    for (int e = thread / kLanes * kVector; e < kColumns<T>; e += kThreads / kLanes * kVector) {
      T packed_means[kVector], packed_variances[kVector];
      read_packed(problem.q, dim, tile.q_item * problem.q.tiles() + first_column / kTile, int(first_column % kTile) + e,
                  d, packed_means, packed_variances);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        T* const column = columns + shared.template lanes_of<kLanes>(e) + shared.template lanes_of<kLanes>(k);
        column[0] = packed_means[k];
        column[kVariances] = packed_variances[k];
      }
    }
  } else {
    for (int r = 0; r < kRows; ++r)
      read_component(problem.p, dim, tile.p_item, tile.first_row() + row + r, d, means[r], variances[r]);
    for (int j = thread / kLanes; j < kColumns<T>; j += kThreads / kLanes) {
      T* const column = columns + shared.template lanes_of<kLanes>(j);
      read_component(problem.q, dim, tile.q_item, first_column + j, d, column[0], column[kVariances]);
    }
  }
  for (int e = thread * kVector; e < 2 * kVariances; e += kThreads * kVector) {
    const T zeros[kVector] = {};
    store(shared.sums + e, zeros);
  }
  __syncthreads();

  for (int phase = 0; phase < kWarps; ++phase) {
    const int first = int(unsigned(warp + phase) % kWarps) * kPhaseColumns;
    const T* const first_weights = shared.weights + shared.rows_of(first) + row;
    const T* const first_lanes = columns + shared.template lanes_of<kLanes>(first);
    T* const first_sums = shared.sums + first * kWarp + lane;
#pragma unroll kFast ? (kRows < kWarpRows ? 8 : 4) : 1
    for (int j = 0; j < kPhaseColumns; ++j) {
      const T* const column = first_lanes + shared.template lanes_of<kLanes>(j);
      const T column_mean = column[0], column_variance = column[kVariances];
      T weights[kRows], mean_sum = 0, variance_sum = 0;
      load(first_weights + shared.rows_of(j), weights);
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
      first_sums[j * kWarp] += mean_sum;
      first_sums[kVariances + j * kWarp] += variance_sum;
    }
    __syncthreads();
  }

  // From the scaled dimension to the caller's.
  if (d < dim) {
    const int64_t scale = problem.scale.item(tile.problem) * padded_dim(dim) + d;
    const double unit = kFast ? ldexp(1.0, problem.scale.exponents[scale]) : 1.0;
    const TileSums sums = tile_sums(task, block);
    if (sums.rows) add_sums<1>(sums.rows, row, sums.num_rows, int(d), int(dim), unit, mean_sums, variance_sums);
    if (sums.columns) {
      constexpr int kStep = kThreads / kLanes, kCount = kColumns<T> / kStep;
      const int first = thread / kLanes;
      T column_means[kCount] = {}, column_variances[kCount] = {};
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int g = 0; g < kGroups<kLanes>; ++g) {
          const T* const own =
              shared.sums + (first + k * kStep) * kWarp + (lane + g * kLanes) % kWarp;   // no bank conflicts
          column_means[k] += own[0];
          column_variances[k] += own[kVariances];
        }
      }
      add_sums<kStep>(sums.columns, first, sums.num_columns, int(d), int(dim), unit, column_means, column_variances);
    }
  }
  __syncthreads();
}

// sum_j w and sum_i w.
template <class T>
CSDIV_DEVICE void sum_weights(const GradientTask<T>& task, const GradientShared<T>& block) {
  const SweepShared<T>& shared = block.sweep;
  const TileSums sums = tile_sums(task, block);
  const int64_t dim = task.problem.dim;
  int k = threadIdx.x;   // a row, or a column behind kTile rows
  forget(k);
  T sum = 0;
  if (k < kTile) {
    if (!sums.rows || k >= sums.num_rows) return;
    for (int j = 0; j < kColumns<T>; ++j) sum += shared.weights[shared.rows_of(j) + k];
    sums.rows[k * (2 * dim + 1) + 2 * dim] += double(sum);
  } else {
    k -= kTile;
    if (!sums.columns || k >= kColumns<T> || k >= sums.num_columns) return;
    const T* const weights = shared.weights + shared.rows_of(k);
    for (int i = 0; i < kTile; ++i) sum += weights[(i + k % kThreadColumns<T>) % kTile];   // no bank conflicts
    sums.columns[k * (2 * dim + 1) + 2 * dim] += double(sum);
  }
}

template <int kLanes, class T>
CSDIV_DEVICE void sweep_tile(const GradientTask<T>& task, GradientShared<T>& shared) {
  sum_weights(task, shared);
  for (int64_t begin = 0; begin < task.problem.dim; begin += kLanes) {
    if (certified(task.problem, shared.walk.tile, begin / kFlagDims))
      sweep<kLanes, true>(task, begin, shared);
    else
      sweep<kLanes, false>(task, begin, shared);
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
  if (threadIdx.x == 0) {
    shared.task = k, shared.row_copy = row_copy, shared.column_copy = column_copy;
    shared.reference = reference_of(task, b);
  }
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

// Cuts the tasks into blocks; the number of phases.
template <class T>
int partition_tasks(GradientTasks<T>& tasks, int processors) {
  SweepSize sizes[3];
  Partition partitions[3];
  for (int k = 0; k < tasks.count; ++k) {
    const GradientTask<T>& task = tasks.tasks[k];
    const Problem<T>& problem = task.problem;
    sizes[k] = {problem.batch, problem.p.n, problem.q.n, task.self, task.rows_wanted, task.columns_wanted};
  }
  choose_partitions<T>(sizes, tasks.count, tasks.tasks[0].problem.dim, processors, partitions);
  for (int k = 0; k < tasks.count; ++k) {
    tasks.tasks[k].partition = partitions[k];
    tasks.tasks[k].blocks = sizes[k].n > 0 ? sizes[k].batch * partitions[k].blocks() : 0;
  }
  return partitions[0].phases;
}

}   // namespace

template <class T>
void sweep_gradients(Context& context, GradientTasks<T>& tasks) {
  const int phases = partition_tasks(tasks, context.processors);
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
