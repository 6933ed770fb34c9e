// From the weights of pairs to the gradients of both sides: the driver behind every backward pass.
//
// Sums over rows are kept in T for up to kRowsPerMerge rows, then in float64; sums over columns are in float64 from one
// tile to the next. The work is cut by sizes alone, in one of three ways:
//   rows      many more rows than columns: blocks of rows, each with sums of its own for all columns;
//   columns   the other way round;
//   square    S row blocks and S column groups, in S phases: phase t runs (r, (r + t) mod S) for all r, so that no two
//             tasks share a row or a column, and one set of sums serves both sides.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "pack.h"
#include "thread_pool.h"

namespace csdiv::cpu {

constexpr int64_t kRowsPerMerge = 1024;   // rows in one accumulator of T before it is merged
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kLopsided = 8;                     // ratio of the sides from which one of them is cut alone
constexpr int64_t kCopies = 8;                       // sets of sums when one side is cut alone
constexpr int64_t kCheapCopies = int64_t(1) << 22;   // elements of column sums up to which every row block has its own

struct Partition {
  int64_t row_blocks = 1, column_groups = 1;
  int64_t phases = 1;   // above 1: square

  int64_t row_copies() const { return phases > 1 ? 1 : column_groups; }
  int64_t column_copies() const { return phases > 1 ? 1 : row_blocks; }
};

inline Partition choose_partition(int64_t n, int64_t m, int64_t tiles, int64_t stripes, bool rows,
                                  int64_t column_size) {
  const bool columns = column_size > 0;
  Partition partition;
  if (!columns && tiles >= kCopies) {
    partition.row_blocks = std::min(tiles, kMaxBlocks);
  } else if (n >= kLopsided * m) {
    partition.row_blocks = std::min(tiles, kCopies);
  } else if (m >= kLopsided * n || !rows) {
    partition.column_groups = std::min(stripes, kCopies);
  } else if (column_size * kCopies <= kCheapCopies) {
    partition.row_blocks = std::clamp(tiles / 2, int64_t(1), kCopies);
  } else {
    partition.row_blocks = partition.column_groups = partition.phases = std::min({tiles, stripes, kMaxBlocks});
  }
  return partition;
}

// Narrower stripes give few columns more groups.
inline int64_t sweep_stripe_columns(int64_t m) {
  return std::clamp(ceil_div(m, 4 * 16) * 16, int64_t(64), kStripeColumns);
}

// One tile of a sweep, and where the sums of its weights go (null: not wanted).
template <class T>
struct SweepTile {
  int64_t problem;
  int64_t first_row, first_column;
  const RowTile<T>& rows;
  const Stripe<T>& columns;
  double* row_sums;
  T* column_sums;

  // Of a mixture with itself, the column of the tile that holds the pair of row r with itself; it may lie outside.
  int64_t diagonal(int64_t r) const { return first_row + r - first_column; }
};

// Which pairs are swept: all, or those with column >= row, of a mixture with itself, where the tiles on the diagonal
// are for `fill` to cut.
enum class Pairs { kAll, kUpperTriangle };

// fill(tile, weights) writes the weights of a tile and returns the mask of rows that have any.
template <class T, class Fill>
class GradientSweep {
 public:
  GradientSweep(const Problem<T>& problem, Pairs pairs, LogWeights log_weights, const SideGradients<T>& grad_p,
                const SideGradients<T>& grad_q, int threads, const Fill& fill)
      : problem_(problem),
        pairs_(pairs),
        grad_p_(grad_p),
        grad_q_(grad_q),
        threads_(threads),
        fill_(fill),
        dim_(problem.dim),
        packed_(problem, log_weights, sweep_stripe_columns(problem.q.n), threads),
        rows_wanted_(grad_p.wanted()),
        columns_wanted_(grad_q.wanted()),
        stripes_of_q_(columns_wanted_ ? problem.q.batch * packed_.stripes() : 0),
        row_size_(rows_wanted_ ? problem.p.batch * problem.p.n * (2 * dim_ + 1) : 0),
        partition_(choose_partition(problem.p.n, problem.q.n, num_row_tiles(problem), packed_.stripes(), rows_wanted_,
                                    stripes_of_q_ * stripe_size())),
        merged_copies_(rows_per_copy() > kRowsPerMerge ? partition_.column_copies() : 1),
        row_sums_(row_size_ * partition_.row_copies()),
        column_sums_(stripes_of_q_ * stripe_size() * merged_copies_),
        recent_sums_(stripes_of_q_ * stripe_size() * partition_.column_copies()),
        recent_rows_(stripes_of_q_ * partition_.column_copies()) {
    fill_zero(row_sums_);
    fill_zero(column_sums_);
    fill_zero(recent_sums_);
  }

  void run() {
    // Problems that share no sums run side by side; those that do run one after the other.
    const auto own_items = [&](const Mixture<T>& side, bool wanted) {
      return !wanted || (!side.index && side.batch == problem_.batch);
    };
    if (own_items(problem_.p, rows_wanted_) && own_items(problem_.q, columns_wanted_)) {
      parallel_for(problem_.batch, threads_, [&](int64_t b) { run_problem(b); });
    } else {
      for (int64_t b = 0; b < problem_.batch; ++b) run_problem(b);
    }
    parallel_for(stripes_of_q_, threads_, [&](int64_t stripe) {
      for (int64_t copy = 0; copy < partition_.column_copies(); ++copy) merge_recent(copy, stripe);
    });
    merge_copies(row_sums_.get(), row_size_, partition_.row_copies());
    merge_copies(column_sums_.get(), stripes_of_q_ * stripe_size(), merged_copies_);
    if (pairs_ == Pairs::kUpperTriangle) {
      columns_to_rows();
      write_rows();
      return;
    }
    if (rows_wanted_) write_rows();
    if (columns_wanted_) write_columns();
  }

 private:
  // At most: of all problems, which may share q.
  int64_t rows_per_copy() const {
    return problem_.batch * ceil_div(num_row_tiles(problem_), partition_.row_blocks) * kTileRows;
  }

  int64_t stripe_size() const { return (2 * dim_ + 1) * packed_.stride(); }

  // Sums of an item's rows: (n, dim) for the means, (n, dim) for the variances, (n) for the weights.
  double* row_sums(int64_t copy, int64_t item) {
    return row_sums_.get() + copy * row_size_ + item * problem_.p.n * (2 * dim_ + 1);
  }

  // Sums of a stripe's columns, likewise (dim, stride), (dim, stride) and (stride); stripes are counted over all items.
  double* column_sums(int64_t copy, int64_t stripe) {
    return column_sums_.get() + (std::min(copy, merged_copies_ - 1) * stripes_of_q_ + stripe) * stripe_size();
  }

  T* recent_sums(int64_t copy, int64_t stripe) {
    return recent_sums_.get() + (copy * stripes_of_q_ + stripe) * stripe_size();
  }

  void merge_recent(int64_t copy, int64_t stripe) {
    double* const sums = column_sums(copy, stripe);
    T* const recent = recent_sums(copy, stripe);
    for (int64_t k = 0; k < stripe_size(); ++k) sums[k] += recent[k];
    std::fill_n(recent, stripe_size(), T(0));
    recent_rows_[copy * stripes_of_q_ + stripe] = 0;
  }

  template <class U>
  void fill_zero(const AlignedArray<U>& array) {
    constexpr int64_t kSlice = 1 << 16;
    parallel_for(ceil_div(array.size(), kSlice), threads_, [&](int64_t task) {
      std::fill_n(array.get() + task * kSlice, std::min(kSlice, array.size() - task * kSlice), U(0));
    });
  }

  void run_problem(int64_t b) {
    const Partition& cut = partition_;
    const bool square = cut.phases > 1;
    for (int64_t phase = 0; phase < cut.phases; ++phase) {
      parallel_for(square ? cut.row_blocks : cut.row_blocks * cut.column_groups, threads_, [&](int64_t task) {
        const int64_t block = square ? task : task / cut.column_groups;
        const int64_t group = square ? (task + phase) % cut.column_groups : task % cut.column_groups;
        run_block(b, block, group);
      });
    }
  }

  void run_block(int64_t b, int64_t block, int64_t group) {
    const int64_t tiles = num_row_tiles(problem_), stripes = packed_.stripes();
    const int64_t first_tile = tiles * block / partition_.row_blocks;
    const int64_t last_tile = tiles * (block + 1) / partition_.row_blocks;
    const int64_t row_copy = partition_.row_copies() > 1 ? group : 0;
    const int64_t column_copy = partition_.column_copies() > 1 ? block : 0;
    T* const weights = scratch<T>(kTileRows * packed_.stride());
    for (int64_t s = stripes * group / partition_.column_groups; s < stripes * (group + 1) / partition_.column_groups;
         ++s) {
      const int64_t stripe = problem_.q.item(b) * stripes + s;
      T* const column_sums = columns_wanted_ ? recent_sums(column_copy, stripe) : nullptr;
      const int64_t last_column = s * sweep_stripe_columns(problem_.q.n) + packed_.stripe(0, s).count - 1;
      const int64_t tiles_here = pairs_ == Pairs::kAll ? last_tile : std::min(last_tile, last_column / kTileRows + 1);
      for (int64_t tile = first_tile; tile < tiles_here; ++tile) {
        if (columns_wanted_) {
          int64_t& recent_rows = recent_rows_[column_copy * stripes_of_q_ + stripe];
          if (recent_rows + kTileRows > kRowsPerMerge) merge_recent(column_copy, stripe);
          recent_rows += kTileRows;
        }
        run_tile(b, tile, s, row_copy, column_sums, weights);
      }
    }
  }

  void run_tile(int64_t b, int64_t tile, int64_t s, int64_t row_copy, T* column_sums, T* weights) {
    const int64_t n = problem_.p.n, first = tile * kTileRows;
    const RowTile<T> rows = row_tile(problem_, b, tile);
    const Stripe<T>& columns = packed_.stripe(problem_.q.item(b), s);
    SweepTile<T> place{b, first, s * sweep_stripe_columns(problem_.q.n), rows, columns, nullptr, nullptr};
    TileGradients<T> grads{};
    if (rows_wanted_) {
      double* const sums = row_sums(row_copy, problem_.p.item(b));
      grads.row_means = sums + first * dim_;
      grads.row_variances = sums + (n + first) * dim_;
      place.row_sums = sums + 2 * n * dim_ + first;
    }
    if (columns_wanted_) {
      grads.column_means = column_sums;
      grads.column_variances = column_sums + dim_ * columns.stride;
      place.column_sums = column_sums + 2 * dim_ * columns.stride;
    }
    if (const uint32_t active = fill_(place, weights))
      tile_kernels<T>().gradients(rows, columns, weights, active, grads);
  }

  void merge_copies(double* sums, int64_t size, int64_t copies) {
    constexpr int64_t kSlice = 1 << 14;
    parallel_for(copies > 1 ? ceil_div(size, kSlice) : 0, threads_, [&](int64_t task) {
      for (int64_t copy = 1; copy < copies; ++copy)
        for (int64_t k = task * kSlice; k < std::min(size, (task + 1) * kSlice); ++k) sums[k] += sums[copy * size + k];
    });
  }

  // Of a mixture with itself: what a component has as a column joins what it has as a row, before anything is rounded.
  void columns_to_rows() {
    const int64_t n = problem_.q.n, width = sweep_stripe_columns(n), stride = packed_.stride();
    parallel_for(problem_.q.batch * packed_.stripes(), threads_, [&](int64_t task) {
      const int64_t item = task / packed_.stripes(), s = task % packed_.stripes();
      const double* const from = column_sums(0, task);
      double* const to = row_sums(0, item);
      for (int64_t j = 0; j < packed_.stripe(item, s).count; ++j) {
        const int64_t i = s * width + j;
        for (int64_t d = 0; d < dim_; ++d) {
          to[i * dim_ + d] -= from[d * stride + j];
          to[(n + i) * dim_ + d] += from[(dim_ + d) * stride + j];
        }
        to[2 * n * dim_ + i] += from[2 * dim_ * stride + j];
      }
    });
  }

  // Sets or adds; `out` is null where the gradient is not wanted.
  static void write(const SideGradients<T>& side, T* out, int64_t k, double value) {
    if (out) out[k] = T(side.add ? out[k] + value : value);
  }

  // Equations (5): delta = mu - nu, so the means of p take the minus sign.
  void write_rows() {
    const int64_t n = problem_.p.n, size = n * dim_, tiles = num_row_tiles(problem_);
    parallel_for(problem_.p.batch * tiles, threads_, [&](int64_t task) {
      const int64_t item = task / tiles, first = task % tiles * kTileRows, last = std::min(n, first + kTileRows);
      const double* const sums = row_sums(0, item);
      for (int64_t k = first * dim_; k < last * dim_; ++k) {
        write(grad_p_, grad_p_.means, item * size + k, -sums[k]);
        write(grad_p_, grad_p_.variances, item * size + k, 0.5 * sums[size + k]);
      }
      for (int64_t i = first; i < last; ++i) write(grad_p_, grad_p_.log_weights, item * n + i, sums[2 * size + i]);
    });
  }

  void write_columns() {
    const int64_t width = sweep_stripe_columns(problem_.q.n), stride = packed_.stride();
    parallel_for(problem_.q.batch * packed_.stripes(), threads_, [&](int64_t task) {
      const int64_t item = task / packed_.stripes(), s = task % packed_.stripes();
      const double* const sums = column_sums(0, task);
      for (int64_t j = 0; j < packed_.stripe(item, s).count; ++j) {
        const int64_t k = item * problem_.q.n + s * width + j;
        for (int64_t d = 0; d < dim_; ++d) {
          write(grad_q_, grad_q_.means, k * dim_ + d, sums[d * stride + j]);
          write(grad_q_, grad_q_.variances, k * dim_ + d, 0.5 * sums[(dim_ + d) * stride + j]);
        }
        write(grad_q_, grad_q_.log_weights, k, sums[2 * dim_ * stride + j]);
      }
    });
  }

  const Problem<T>& problem_;
  const Pairs pairs_;
  const SideGradients<T> grad_p_, grad_q_;
  const int threads_;
  const Fill& fill_;
  const int64_t dim_;
  const PackedColumns<T> packed_;
  const bool rows_wanted_, columns_wanted_;
  const int64_t stripes_of_q_, row_size_;
  const Partition partition_;
  const int64_t merged_copies_;   // of the sums in float64; one where no copy has to be merged before the end
  AlignedArray<double> row_sums_, column_sums_;
  AlignedArray<T> recent_sums_;        // of the last rows, to be added to column_sums_
  std::vector<int64_t> recent_rows_;   // how many, per stripe
};

template <class T, class Fill>
void sweep_gradients(const Problem<T>& problem, LogWeights log_weights, const SideGradients<T>& grad_p,
                     const SideGradients<T>& grad_q, int threads, const Fill& fill) {
  GradientSweep<T, Fill>(problem, Pairs::kAll, log_weights, grad_p, grad_q, useful_threads(problem, threads), fill)
      .run();
}

// A mixture with itself: what a component has as a row and what it has as a column are added up.
template <class T, class Fill>
void sweep_self_gradients(const Problem<T>& problem, LogWeights log_weights, const SideGradients<T>& grad, int threads,
                          const Fill& fill) {
  if (!grad.wanted()) return;
  GradientSweep<T, Fill>(problem, Pairs::kUpperTriangle, log_weights, grad, grad, useful_threads(problem, threads),
                         fill)
      .run();
}

}   // namespace csdiv::cpu
