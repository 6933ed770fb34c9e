// The logits of a tile of pairs, in registers: every thread has kThreadRows x kThreadColumns of them.
#pragma once

#include "pair.h"

namespace csdiv::cuda {

constexpr int kThreadRows = 4;
template <class T>
constexpr int kThreadColumns = 16 / sizeof(T);   // one vector
constexpr int kColumnThreads = 16, kRowThreads = kTile / kThreadRows;
template <class T>
constexpr int kColumns = kColumnThreads * kThreadColumns<T>;   // of a tile of pairs: kTile or half of it
template <class T>
constexpr int kChunk = 128 / sizeof(T);   // dimensions in shared memory at a time

static_assert(kColumnThreads * kRowThreads == kThreads);

template <class T>
struct LogitShared {
  alignas(16) T rows[kChunk<T>][2][kTile];
  alignas(16) T columns[kChunk<T>][2][kColumns<T>];
};

// Which pairs, in tiles of kTile rows and kColumns columns. Narrow integers: they stay in registers all the time.
struct TileIndex {
  int problem, p_item, q_item, row_tile, column_tile;

  CSDIV_HOST_DEVICE int64_t first_row() const { return int64_t(row_tile) * kTile; }

  template <class T>
  CSDIV_HOST_DEVICE int64_t first_column() const {
    return int64_t(column_tile) * kColumns<T>;
  }
};

template <class T>
CSDIV_HOST_DEVICE int64_t column_tiles(const Problem<T>& problem) {
  return ceil_div(problem.q.n, kColumns<T>);
}

// The tiles that a block goes through, column by column. It is the same for all of its threads, and kept in shared
// memory: it is not worth their registers.
struct TileWalk {
  TileIndex tile;
  int row_end;
  Part columns;

  CSDIV_DEVICE void begin(const TileIndex& of, Part rows, Part its_columns) {
    if (threadIdx.x != 0) return;
    tile = of, row_end = rows.end, columns = its_columns;
    tile.row_tile = rows.begin, tile.column_tile = columns.begin - 1;
  }

  // The next tile, in every thread; false: there is none.
  CSDIV_DEVICE bool next() {
    __syncthreads();
    if (threadIdx.x == 0 && ++tile.column_tile == columns.end) tile.column_tile = columns.begin, ++tile.row_tile;
    __syncthreads();
    return tile.row_tile < row_end;
  }
};

// Whether the fast form may be taken in the dimensions of flag `k`.
template <class T>
CSDIV_DEVICE bool certified(const Problem<T>& problem, const TileIndex& tile, int64_t k) {
  const int64_t flags = flags_per_tile(problem.dim), q_tile = tile.first_column<T>() / kTile;
  const uint8_t p = problem.p.flags[(tile.p_item * problem.p.tiles() + tile.row_tile) * flags + k];
  const uint8_t q = problem.q.flags[(tile.q_item * problem.q.tiles() + q_tile) * flags + k];
  return (p & q & kRegular) && ((p | q) & kWide);
}

// The packed components of a tile, kWidth from `first` on.
template <int kWidth, class T>
CSDIV_DEVICE void copy_packed(const T* values, int first, int dims, T* to) {
  constexpr int kVector = 16 / sizeof(T), kVectors = kWidth / kVector;
  int thread = threadIdx.x;
  forget(thread);
  for (int e = thread; e < dims * 2 * kVectors; e += kThreads) {
    const int line = e / kVectors, at = e % kVectors * kVector;
    T vector[kVector];
    load<kVector>(values + line * kTile + first + at, vector);
    store(to + line * kWidth + at, vector);
  }
}

// Mean and variance of a component as the caller has them; a negative variance is NaN, what counts nothing regular.
template <class T>
CSDIV_DEVICE void read_component(const Mixture<T>& side, int64_t dim, int64_t item, int64_t k, int64_t d, T& mean,
                                 T& variance) {
  mean = 0, variance = T(0.5);
  if (d >= dim || !counts(side.log2_weights[item * side.tiles() * kTile + k])) return;
  mean = side.means[(item * side.n + k) * dim + d];
  variance = side.variances[(item * side.n + k) * dim + d];
  if (!(variance >= 0)) variance = T(NAN);
}

template <int kWidth, class T>
CSDIV_DEVICE void copy_exact(const Mixture<T>& side, int64_t dim, int64_t item, int64_t first, int64_t begin, int dims,
                             T* to) {
#pragma unroll 1
  for (int e = threadIdx.x; e < dims * kWidth; e += kThreads) {
    const int k = e % kWidth, d = e / kWidth;
    read_component(side, dim, item, first + k, begin + d, to[2 * d * kWidth + k], to[(2 * d + 1) * kWidth + k]);
  }
}

template <class T>
using PairSums = PairSum<T>[kThreadRows][kThreadColumns<T>];

// What a thread needs of one dimension.
template <class T>
struct Operands {
  T row_means[kThreadRows], row_variances[kThreadRows];
  T column_means[kThreadColumns<T>], column_variances[kThreadColumns<T>];

  Operands() = default;
  CSDIV_DEVICE Operands(const LogitShared<T>& shared, int d, int row, int column) {
    load(shared.rows[d][0] + row, row_means);
    load(shared.rows[d][1] + row, row_variances);
    load(shared.columns[d][0] + column, column_means);
    load(shared.columns[d][1] + column, column_variances);
  }
};

// The inner loop of everything.
template <class T>
CSDIV_DEVICE void add_fast(const LogitShared<T>& shared, const T* group_centers, int dims, int row, int column,
                           PairSums<T>& sums) {
#pragma unroll 1
  for (int begin = 0; begin < dims; begin += kGroup) {
    const T center = group_centers[begin / kGroup];
    Operands<T> operands[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) operands[g] = Operands<T>(shared, begin + g, row, column);
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
      for (int b = 0; b < kThreadColumns<T>; ++b) {
        T delta[kGroup], c[kGroup];
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          delta[g] = operands[g].row_means[a] - operands[g].column_means[b];
          c[g] = operands[g].row_variances[a] + operands[g].column_variances[b];
        }
        sums[a][b].add_group(delta, c, center);
      }
    }
  }
}

template <class T>
CSDIV_DEVICE void add_exact(const LogitShared<T>& shared, const T* centers, const int* exponents, int dims, int row,
                            int column, PairSums<T>& sums) {
#pragma unroll 1
  for (int d = 0; d < dims; ++d) {
    const Operands<T> operands(shared, d, row, column);
    const T center = centers[d];
    const int exponent = 2 * exponents[d];
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
      for (int b = 0; b < kThreadColumns<T>; ++b)
        sums[a][b].add_exact(operands.row_means[a] - operands.column_means[b],
                             operands.row_variances[a] + operands.column_variances[b], exponent, center);
    }
  }
}

template <class T>
using Logits = T[kThreadRows][kThreadColumns<T>];

// Some dimensions of a tile into shared memory: packed, or as the caller has them where the fast form may not be taken.
template <class T>
CSDIV_DEVICE void load_chunk(const Problem<T>& problem, TileIndex tile, int begin, int dims, bool fast, bool rows_kept,
                             LogitShared<T>& shared) {
  forget(tile.p_item), forget(tile.q_item), forget(tile.row_tile), forget(tile.column_tile);
  const int64_t padded = padded_dim(problem.dim), first_column = tile.first_column<T>();
  if (fast) {
    const int64_t p_tile = tile.p_item * problem.p.tiles() + tile.row_tile;
    const int64_t q_tile = tile.q_item * problem.q.tiles() + first_column / kTile;
    const T* const p_values = problem.p.values + (p_tile * padded + begin) * 2 * kTile;
    const T* const q_values = problem.q.values + (q_tile * padded + begin) * 2 * kTile;
    if (!rows_kept) copy_packed<kTile>(p_values, 0, dims, &shared.rows[0][0][0]);
    copy_packed<kColumns<T>>(q_values, int(first_column % kTile), dims, &shared.columns[0][0][0]);
  } else {
    copy_exact<kTile>(problem.p, problem.dim, tile.p_item, tile.first_row(), begin, dims, &shared.rows[0][0][0]);
    copy_exact<kColumns<T>>(problem.q, problem.dim, tile.q_item, first_column, begin, dims, &shared.columns[0][0][0]);
  }
}

// logits[a][b] of this thread, base 2, with the weights of q. All threads of the block call it together. `rows_kept`:
// shared memory still has the packed rows of this tile from the last call; set for the next one. kNearZero: values
// whose differences may be near zero.
template <bool kNearZero = false, class T>
CSDIV_DEVICE void tile_logits(const Problem<T>& problem, const TileIndex& tile, bool& rows_kept, LogitShared<T>& shared,
                              Logits<T>& logits) {
  PairSums<T> sums;
  bool fast = false;
  for (int begin = 0; begin < problem.dim; begin += kChunk<T>) {
    int thread = threadIdx.x, padded = int(padded_dim(problem.dim));
    forget(thread), forget(padded);
    const int row = thread / kColumnThreads * kThreadRows, column = thread % kColumnThreads * kThreadColumns<T>;
    const int dims = min(padded - begin, kChunk<T>);
    fast = certified(problem, tile, begin / kFlagDims);
    __syncthreads();
    load_chunk(problem, tile, begin, dims, fast, rows_kept, shared);
    __syncthreads();
    const int64_t scale = problem.scale.item(tile.problem) * int64_t(padded) + begin;
    if (fast)
      add_fast(shared, problem.scale.group_centers + scale / kGroup, dims, row, column, sums);
    else
      add_exact(shared, problem.scale.centers + scale, problem.scale.exponents + scale, dims, row, column, sums);
    rows_kept = fast && padded <= kChunk<T>;
  }
  const int64_t q_tile = tile.q_item * problem.q.tiles() + tile.first_column<T>() / kTile;
  const int column = threadIdx.x % kColumnThreads * kThreadColumns<T>;
  if (kNearZero && fast && problem.scale.same_dims) {
    const Operands<T> operands(shared, 0, threadIdx.x / kColumnThreads * kThreadRows, column);
    const T center = problem.scale.centers[problem.scale.item(tile.problem) * padded_dim(problem.dim)];
#pragma unroll
    for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
      for (int b = 0; b < kThreadColumns<T>; ++b)
        sums[a][b].set_log_determinant(operands.row_variances[a], operands.column_variances[b], int(problem.dim),
                                       center);
    }
  }
  const T* const weights = problem.q.log2_weights + q_tile * kTile + tile.first_column<T>() % kTile + column;
#pragma unroll
  for (int a = 0; a < kThreadRows; ++a) {
#pragma unroll
    for (int b = 0; b < kThreadColumns<T>; ++b) logits[a][b] = sums[a][b].log2_density() + weights[b];
  }
}

// What a pair (i, j) of a mixture with itself counts, base 2: pairs above the diagonal stand for those below.
template <class T>
CSDIV_DEVICE T upper_triangle(T logit, int64_t i, int64_t j) {
  return j < i ? -T(INFINITY) : j == i ? logit : logit + 1;
}

}   // namespace csdiv::cuda
