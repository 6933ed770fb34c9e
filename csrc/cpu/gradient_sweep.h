// From the weights of pairs to the gradients of both sides: the driver behind every backward pass.
//
// Sums over rows are kept in T for up to kRowsPerMerge rows, then in float64; sums over columns are in float64 from one
// tile to the next.
//
// The weights are given, by values that an earlier pass has found; or this is the only pass, and they are relative to
// references that rise as it goes, of every stripe and of every row: the sums are scaled when their reference rises,
// and once more when the values are known.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "partition.h"
#include "thread_pool.h"

namespace csdiv::cpu {

constexpr int64_t kRowsPerMerge = 1024;   // rows in one accumulator of T before it is merged
constexpr double kRise = 8;               // nats that weights may exceed their stripe's reference by

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

// The weights of a tile. Given ones: fill(tile, weights) writes them and returns the mask of rows that have any. In the
// only pass Fill is derived from this and offers four functions.
//   start(groups): called first, with the number of column groups.
//   logits(tile, group, terms, scales): writes terms, row r of which times exp(scales[r]) are the weights times the
//     total; and adds them to the total.
//   finish(): called after all tiles; false if a total is not finite.
//   log_total(b, i): of the problem that row i of problem b belongs to.
struct OnlyPass {
  double factor;   // of what the sweep results in
};

template <class T, class Fill>
class GradientSweep {
  static constexpr bool kOnlyPass = std::is_base_of_v<OnlyPass, Fill>;

 public:
  GradientSweep(const Problem<T>& problem, Pairs pairs, LogWeights log_weights, const SideGradients<T>& grad_p,
                const SideGradients<T>& grad_q, int threads, Fill& fill)
      : problem_(problem),
        pairs_(pairs),
        grad_p_(grad_p),
        grad_q_(grad_q),
        threads_(threads),
        fill_(fill),
        dim_(problem.dim),
        packed_(problem, log_weights, threads),
        rows_wanted_(grad_p.wanted()),
        columns_wanted_(grad_q.wanted()),
        stripes_of_q_(columns_wanted_ ? problem.q.batch * packed_.stripes() : 0),
        row_size_(rows_wanted_ ? problem.p.batch * problem.p.n * (2 * dim_ + 1) : 0),
        partition_(choose_partition(problem, packed_, kOnlyPass || rows_wanted_, kOnlyPass || columns_wanted_)),
        merged_copies_(rows_per_copy() > kRowsPerMerge ? partition_.column_copies() : 1),
        row_sums_(row_size_ * partition_.row_copies()),
        column_sums_(stripes_of_q_ * stripe_size() * merged_copies_),
        recent_sums_(stripes_of_q_ * stripe_size() * partition_.column_copies()),
        recent_rows_(stripes_of_q_ * partition_.column_copies()),
        row_references_(kOnlyPass ? row_size_ / (2 * dim_ + 1) * partition_.row_copies() : 0, kNoReference),
        column_references_(kOnlyPass ? recent_rows_.size() : 0, kNoReference) {
    fill_zero(row_sums_);
    fill_zero(column_sums_);
    fill_zero(recent_sums_);
  }

  // False: this cannot be the only pass, and nothing was written. A total is not finite, or a sum that was relative to
  // a low reference has overflowed.
  bool run() {
    if constexpr (kOnlyPass) fill_.start(partition_.column_groups);
    // Problems that share no sums run side by side; those that do run one after the other.
    const auto own_items = [&](const Mixture<T>& side, bool wanted) {
      return !wanted || (!side.index && side.batch == problem_.batch);
    };
    if (own_items(problem_.p, rows_wanted_) && own_items(problem_.q, columns_wanted_)) {
      parallel_for(problem_.batch, threads_, [&](int64_t b) { run_problem(b); });
    } else {
      for (int64_t b = 0; b < problem_.batch; ++b) run_problem(b);
    }
    if constexpr (kOnlyPass) {
      if (!fill_.finish()) return false;
      scale_sums();
    }
    parallel_for(stripes_of_q_, threads_, [&](int64_t stripe) {
      for (int64_t copy = 0; copy < partition_.column_copies(); ++copy) merge_recent(copy, stripe);
    });
    merge_copies(row_sums_.get(), row_size_, partition_.row_copies());
    merge_copies(column_sums_.get(), stripes_of_q_ * stripe_size(), merged_copies_);
    if (kOnlyPass && !(all_finite(row_sums_, row_size_) && all_finite(column_sums_, stripes_of_q_ * stripe_size())))
      return false;
    if (pairs_ == Pairs::kUpperTriangle) {
      columns_to_rows();
      write_rows();
      return true;
    }
    if (rows_wanted_) write_rows();
    if (columns_wanted_) write_columns();
    return true;
  }

 private:
  static constexpr double kNoReference = -std::numeric_limits<double>::infinity();

  // At most: of all problems, which may share q.
  int64_t rows_per_copy() const {
    return problem_.batch * ceil_div(num_row_tiles(problem_), partition_.row_blocks) * kTileRows;
  }

  int64_t stripe_size() const { return (2 * dim_ + 1) * packed_.stride(); }

  // Sums of an item's rows: (n, dim) for the means, (n, dim) for the variances, (n) for the weights.
  double* row_sums(int64_t copy, int64_t item) {
    return row_sums_.get() + copy * row_size_ + item * problem_.p.n * (2 * dim_ + 1);
  }

  double& row_reference(int64_t copy, int64_t item, int64_t i) {
    return row_references_[(copy * problem_.p.batch + item) * problem_.p.n + i];
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

  // What the weights of a tile, exp(largest) at most, are to be relative to in the sums of `copy` and `stripe`; rises,
  // and scales the sums, where they would exceed it by much.
  double raise_reference(int64_t copy, int64_t stripe, double largest) {
    double& reference = column_references_[copy * stripes_of_q_ + stripe];
    if (largest > reference + kRise) {
      scale_columns(copy, stripe, std::exp(reference - largest));
      reference = largest;
    }
    return reference;
  }

  void scale_columns(int64_t copy, int64_t stripe, double factor) {
    T* const recent = recent_sums(copy, stripe);
    for (int64_t k = 0; k < stripe_size(); ++k) recent[k] *= T(factor);
    if (merged_copies_ < partition_.column_copies()) return;   // nothing is merged yet
    double* const sums = column_sums(copy, stripe);
    for (int64_t k = 0; k < stripe_size(); ++k) sums[k] *= factor;
  }

  // What the rows of a tile gained joins their sums, relative to the larger reference.
  void add_to_rows(int64_t copy, int64_t item, int64_t first, uint32_t active, double reference, double* gains) {
    double* const sums = row_sums(copy, item);
    const int64_t n = problem_.p.n;
    for (int64_t r = 0; active >> r; ++r) {
      if (!(active >> r & 1)) continue;
      double& own = row_reference(copy, item, first + r);
      const double top = std::max(own, reference);
      const double keep = own == top ? 1 : std::exp(own - top), join = reference == top ? 1 : std::exp(reference - top);
      const auto add = [&](double& sum, double& gain) {
        sum = sum * keep + gain * join;
        gain = 0;
      };
      for (int64_t d = 0; d < dim_; ++d) {
        add(sums[(first + r) * dim_ + d], gains[r * dim_ + d]);
        add(sums[(n + first + r) * dim_ + d], gains[(kTileRows + r) * dim_ + d]);
      }
      add(sums[2 * n * dim_ + first + r], gains[2 * kTileRows * dim_ + r]);
      own = top;
    }
  }

  // All sums, from their references to the totals.
  void scale_sums() {
    parallel_for(stripes_of_q_ * partition_.column_copies(), threads_, [&](int64_t task) {
      const int64_t stripe = task % stripes_of_q_, item = stripe / packed_.stripes();
      const double reference = column_references_[task];
      scale_columns(task / stripes_of_q_, stripe, fill_.factor * std::exp(reference - fill_.log_total(item, 0)));
    });
    const int64_t n = rows_wanted_ ? problem_.p.n : 0;
    parallel_for(problem_.p.batch * n * partition_.row_copies(), threads_, [&](int64_t task) {
      const int64_t i = task % n, item = task / n % problem_.p.batch, copy = task / n / problem_.p.batch;
      const double factor = fill_.factor * std::exp(row_reference(copy, item, i) - fill_.log_total(item, i));
      double* const sums = row_sums(copy, item);
      for (int64_t d = 0; d < dim_; ++d) {
        sums[i * dim_ + d] *= factor;
        sums[(n + i) * dim_ + d] *= factor;
      }
      sums[2 * n * dim_ + i] *= factor;
    });
  }

  static bool all_finite(const AlignedArray<double>& sums, int64_t size) {
    bool finite = true;
    for (int64_t k = 0; k < size; ++k) finite &= std::abs(sums.get()[k]) <= std::numeric_limits<double>::max();
    return finite;
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
    const Part tiles = part(num_row_tiles(problem_), partition_.row_blocks, block);
    const Part stripes = part(packed_.stripes(), partition_.column_groups, group);
    const int64_t row_copy = partition_.row_copies() > 1 ? group : 0;
    const int64_t column_copy = partition_.column_copies() > 1 ? block : 0;
    T* const weights = scratch<T>(kTileRows * packed_.stride());
    std::vector<double> gains(kOnlyPass && rows_wanted_ ? kTileRows * (2 * dim_ + 1) : 0);
    for (int64_t s = stripes.begin; s < stripes.end; ++s) {
      const int64_t stripe = problem_.q.item(b) * packed_.stripes() + s;
      const int64_t last_column = s * packed_.width() + packed_.stripe(0, s).count - 1;
      const int64_t tiles_end = pairs_ == Pairs::kAll ? tiles.end : std::min(tiles.end, last_column / kTileRows + 1);
      for (int64_t tile = tiles.begin; tile < tiles_end; ++tile) {
        if (columns_wanted_) {
          int64_t& recent_rows = recent_rows_[column_copy * stripes_of_q_ + stripe];
          if (recent_rows + kTileRows > kRowsPerMerge) merge_recent(column_copy, stripe);
          recent_rows += kTileRows;
        }
        run_tile(b, tile, s, stripe, group, row_copy, column_copy, weights, gains.data());
      }
    }
  }

  void run_tile(int64_t b, int64_t tile, int64_t s, int64_t stripe, int64_t group, int64_t row_copy,
                int64_t column_copy, T* weights, double* gains) {
    const int64_t n = problem_.p.n, first = tile * kTileRows;
    const RowTile<T> rows = row_tile(problem_, b, tile);
    const int64_t item = problem_.p.item(b);
    const Stripe<T>& columns = packed_.stripe(problem_.q.item(b), s);
    SweepTile<T> place{b, first, s * packed_.width(), rows, columns, nullptr, nullptr};
    TileGradients<T> grads{};
    if (rows_wanted_) {
      double* const sums = kOnlyPass ? gains : row_sums(row_copy, item) + first * dim_;
      const int64_t rows_of_sums = kOnlyPass ? kTileRows : n;
      grads.row_means = sums;
      grads.row_variances = sums + rows_of_sums * dim_;
      place.row_sums = kOnlyPass ? gains + 2 * kTileRows * dim_ : row_sums(row_copy, item) + 2 * n * dim_ + first;
    }
    if (columns_wanted_) {
      grads.column_means = recent_sums(column_copy, stripe);
      grads.column_variances = grads.column_means + dim_ * columns.stride;
      place.column_sums = grads.column_variances + dim_ * columns.stride;
    }
    const TileKernels<T>& kernels = tile_kernels<T>();
    if constexpr (kOnlyPass) {
      double scales[kTileRows];
      T factors[kTileRows];
      fill_.logits(place, group, weights, scales);
      const double largest = *std::max_element(scales, scales + rows.count);
      if (!std::isfinite(largest)) return;   // no weights, or no result
      const double reference = columns_wanted_ ? raise_reference(column_copy, stripe, largest) : largest;
      for (int64_t r = 0; r < rows.count; ++r) factors[r] = T(std::exp(scales[r] - reference));
      const uint32_t active = kernels.scale(rows, columns, factors, weights, place.column_sums, place.row_sums);
      kernels.gradients(rows, columns, weights, active, grads);
      if (rows_wanted_) add_to_rows(row_copy, item, first, active, reference, gains);
    } else if (const uint32_t active = fill_(place, weights)) {
      kernels.gradients(rows, columns, weights, active, grads);
    }
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
    const int64_t n = problem_.q.n, width = packed_.width(), stride = packed_.stride();
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
    const int64_t width = packed_.width(), stride = packed_.stride();
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
  Fill& fill_;
  const int64_t dim_;
  const PackedColumns<T> packed_;
  const bool rows_wanted_, columns_wanted_;
  const int64_t stripes_of_q_, row_size_;
  const Partition partition_;
  const int64_t merged_copies_;   // of the sums in float64; one where no copy has to be merged before the end
  AlignedArray<double> row_sums_, column_sums_;
  AlignedArray<T> recent_sums_;                              // of the last rows, to be added to column_sums_
  std::vector<int64_t> recent_rows_;                         // how many, per stripe
  std::vector<double> row_references_, column_references_;   // log of what the sums are relative to
};

template <class T, class Fill>
bool sweep_gradients(const Problem<T>& problem, LogWeights log_weights, const SideGradients<T>& grad_p,
                     const SideGradients<T>& grad_q, int threads, Fill& fill) {
  return GradientSweep<T, Fill>(problem, Pairs::kAll, log_weights, grad_p, grad_q, useful_threads(problem, threads),
                                fill)
      .run();
}

// A mixture with itself: what a component has as a row and what it has as a column are added up.
template <class T, class Fill>
bool sweep_self_gradients(const Problem<T>& problem, const SideGradients<T>& grad, int threads, Fill& fill) {
  return GradientSweep<T, Fill>(problem, Pairs::kUpperTriangle, LogWeights::kKept, grad, grad,
                                useful_threads(problem, threads), fill)
      .run();
}

}   // namespace csdiv::cpu
