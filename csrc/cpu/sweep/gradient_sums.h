// The sums that a sweep over pairs adds up for the gradients of both sides, and how they become these gradients.
//
// Sums over rows are kept in T for the columns of one stripe, then in float64; sums over columns in T for up to
// kRowsPerMerge rows, then in float64.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/pack.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/memory.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {

constexpr int64_t kRowsPerMerge = 1024;   // rows in one accumulator of T before it is merged

constexpr int64_t kLargeOutput = int64_t(1) << 23;   // numbers, which no cache holds until they are read

// f(numbers, count) for slices of the array.
template <class T, class F>
void for_each_slice(const AlignedArray<T>& array, int threads, const F& f) {
  constexpr int64_t kSlice = 1 << 16;
  parallel_for(ceil_div(array.size(), kSlice), threads,
               [&](int64_t task) { f(array.get() + task * kSlice, std::min(kSlice, array.size() - task * kSlice)); });
}

template <class T>
void fill_zero(const AlignedArray<T>& array, int threads) {
  for_each_slice(array, threads, [](T* numbers, int64_t count) { std::fill_n(numbers, count, T(0)); });
}

// Of `n` rows: (n, dim) for the means, (n, dim) for the variances, (n) for the weights.
struct RowGradientSums {
  double *means, *variances, *weights;

  static int64_t size(int64_t n, int64_t dim) { return n * (2 * dim + 1); }

  // From row `first` on.
  static RowGradientSums at(double* sums, int64_t n, int64_t dim, int64_t first) {
    return {sums + first * dim, sums + (n + first) * dim, sums + 2 * n * dim + first};
  }

  void add(const RowGradientSums& other, int64_t count, int64_t dim) const {
    for (int64_t k = 0; k < count * dim; ++k) means[k] += other.means[k];
    for (int64_t k = 0; k < count * dim; ++k) variances[k] += other.variances[k];
    for (int64_t r = 0; r < count; ++r) weights[r] += other.weights[r];
  }

  void scale(double factor, int64_t dim) const {
    for (int64_t d = 0; d < dim; ++d) means[d] *= factor;
    for (int64_t d = 0; d < dim; ++d) variances[d] *= factor;
    *weights *= factor;
  }
};

// Of the columns of one stripe: (dim, stride) for the means, (dim, stride) for the variances, (stride) for the weights.
template <class T>
struct ColumnGradientSums {
  T *means, *variances, *weights;
};

template <class T>
class GradientSums {
 public:
  // `copies` sets of column sums, none of which is added more than `rows_per_copy` rows.
  GradientSums(const Problem<T>& problem, const PackedColumns<T>& packed, bool rows_wanted, bool columns_wanted,
               int64_t copies, int64_t rows_per_copy, int threads)
      : problem_(problem),
        packed_(packed),
        dim_(problem.dim),
        threads_(threads),
        stripes_(columns_wanted ? problem.q.batch * packed.stripes() : 0),
        copies_(copies),
        merged_copies_(rows_per_copy > kRowsPerMerge ? copies : 0),
        rows_(rows_wanted ? problem.p.batch * RowGradientSums::size(problem.p.n, problem.dim) : 0),
        columns_(stripes_ * stripe_size() * merged_copies_),
        recent_(stripes_ * stripe_size() * copies),
        recent_rows_(stripes_ * copies),
        has_rows_(rows_wanted ? problem.p.batch * num_row_tiles(problem) : 0),
        has_merged_(stripes_ * merged_copies_) {}

  // Sums are set to zero where they are first added to, and here those that never were.
  void zero_the_rest() {
    const int64_t tiles = num_row_tiles(problem_);
    for (int64_t k = 0; k < int64_t(has_rows_.size()); ++k) rows_for_tile(k / tiles, k % tiles);
  }

  bool finite() {
    std::atomic<bool> finite{true};
    const auto check = [&](const auto* sums, int64_t count) {
      using Sum = std::remove_const_t<std::remove_pointer_t<decltype(sums)>>;
      if (!tile_kernels<Sum>().finite(sums, count)) finite = false;
    };
    for_each_slice(rows_, threads_, check);
    parallel_for(stripes_, threads_,
                 [&](int64_t stripe) { for_each_copy(stripe, [&](const auto* sums) { check(sums, stripe_size()); }); });
    return finite;
  }

  RowGradientSums rows(int64_t item, int64_t first) {
    const int64_t n = problem_.p.n;
    return RowGradientSums::at(rows_.get() + item * RowGradientSums::size(n, dim_), n, dim_, first);
  }

  // Where a tile adds its share.
  RowGradientSums rows_for_tile(int64_t item, int64_t tile) {
    const RowGradientSums sums = rows(item, tile * kTileRows);
    char& has_rows = has_rows_[item * num_row_tiles(problem_) + tile];
    if (!has_rows) {
      const int64_t count = rows_of_tile(tile);
      std::fill_n(sums.means, count * dim_, 0.0);
      std::fill_n(sums.variances, count * dim_, 0.0);
      std::fill_n(sums.weights, count, 0.0);
      has_rows = true;
    }
    return sums;
  }

  // The same; stripes are counted over all items.
  ColumnGradientSums<T> columns_for_tile(int64_t copy, int64_t stripe) {
    int64_t& recent_rows = recent_rows_[copy * stripes_ + stripe];
    if (recent_rows + kTileRows > kRowsPerMerge) merge_recent(copy, stripe);
    T* const sums = recent(copy, stripe);
    const bool first = recent_rows == 0;
    recent_rows += kTileRows;
    return first ? columns_in(sums) : column_sums(sums);
  }

  void scale_columns(int64_t item, double factor) {
    parallel_for(packed_.stripes(), threads_, [&](int64_t s) {
      const int64_t stripe = item * packed_.stripes() + s;
      for_each_copy(stripe, [&](auto* sums) {
        using Sum = std::remove_reference_t<decltype(*sums)>;
        for (int64_t k = 0; k < stripe_size(); ++k) sums[k] *= Sum(factor);
      });
    });
  }

  // Of a mixture with itself: what a component has as a column joins what it has as a row, before anything is rounded.
  void columns_to_rows() {
    parallel_for(problem_.q.batch * packed_.stripes(), threads_, [&](int64_t task) {
      const int64_t item = task / packed_.stripes(), s = task % packed_.stripes();
      const RowGradientSums to = rows(item, s * packed_.width());
      write_stripe<double>(column_totals(task), packed_.stripe(item, s).count,
                           {to.means, to.variances, to.weights, true}, -1, 1);
    });
  }

  // Equations (5): delta = mu - nu, so the means of p take the minus sign.
  void write_rows(const SideGradients<T>& grad) {
    const int64_t n = problem_.p.n, tiles = num_row_tiles(problem_);
    const int threads = threads_for(problem_.p.batch * n * dim_, threads_);
    parallel_for(problem_.p.batch * tiles, threads, [&](int64_t task) {
      const int64_t item = task / tiles, first = task % tiles * kTileRows, count = std::min(kTileRows, n - first);
      const RowGradientSums sums = rows(item, first);
      const SideGradients<T> to = grad.from(item * n + first, dim_);
      const TileKernels<T>& kernels = tile_kernels<T>();
      if (to.means) kernels.write_sums(sums.means, count * dim_, -1, to.add, to.means);
      if (to.variances) kernels.write_sums(sums.variances, count * dim_, 0.5, to.add, to.variances);
      if (to.log_weights) kernels.write_sums(sums.weights, count, 1, to.add, to.log_weights);
    });
  }

  void write_columns(const SideGradients<T>& grad) {
    parallel_for(stripes_, threads_, [&](int64_t task) {
      const int64_t item = task / packed_.stripes(), s = task % packed_.stripes();
      write_stripe(column_totals(task), packed_.stripe(item, s).count,
                   grad.from(item * problem_.q.n + s * packed_.width(), dim_), 1, 0.5);
    });
  }

  int64_t stripe_size() const { return (2 * dim_ + 1) * packed_.stride(); }

  // Zeros for the sums of one stripe, in `memory` for stripe_size() numbers.
  ColumnGradientSums<T> columns_in(T* memory) const {
    std::fill_n(memory, stripe_size(), T(0));
    return column_sums(memory);
  }

  // Sets the gradients of one stripe, whose sums are final and not kept here.
  void write_final(const SideGradients<T>& grad, int64_t item, int64_t s, const ColumnGradientSums<T>& sums) const {
    const int64_t first = s * packed_.width(), count = std::min(packed_.width(), problem_.q.n - first);
    const int64_t k = item * problem_.q.n + first, stride = packed_.stride();
    const TileKernels<T>& kernels = tile_kernels<T>();
    const bool large = problem_.q.batch * problem_.q.n * dim_ >= kLargeOutput;
    const auto transpose = large ? kernels.transpose_past_caches : kernels.transpose;
    if (grad.means) transpose(sums.means, stride, dim_, count, grad.means + k * dim_, dim_);
    if (grad.variances) {
      for (int64_t e = 0; e < dim_ * stride; ++e) sums.variances[e] *= T(0.5);
      transpose(sums.variances, stride, dim_, count, grad.variances + k * dim_, dim_);
    }
    if (grad.log_weights) std::copy_n(sums.weights, count, grad.log_weights + k);
  }

 private:
  ColumnGradientSums<T> column_sums(T* sums) const {
    return {sums, sums + dim_ * packed_.stride(), sums + 2 * dim_ * packed_.stride()};
  }

  double* merged(int64_t copy, int64_t stripe) { return columns_.get() + (copy * stripes_ + stripe) * stripe_size(); }

  T* recent(int64_t copy, int64_t stripe) { return recent_.get() + (copy * stripes_ + stripe) * stripe_size(); }

  void merge_recent(int64_t copy, int64_t stripe) {
    double* const to = merged(copy, stripe);
    const T* const from = recent(copy, stripe);
    char& has_merged = has_merged_[copy * stripes_ + stripe];
    if (!has_merged) std::fill_n(to, stripe_size(), 0.0);
    tile_kernels<T>().add_sums(from, stripe_size(), to);
    has_merged = true;
    recent_rows_[copy * stripes_ + stripe] = 0;
  }

  // f(sums) for all that there are of a stripe's columns.
  template <class F>
  void for_each_copy(int64_t stripe, const F& f) {
    for (int64_t copy = 0; copy < merged_copies_; ++copy)
      if (has_merged_[copy * stripes_ + stripe]) f(merged(copy, stripe));
    for (int64_t copy = 0; copy < copies_; ++copy)
      if (recent_rows_[copy * stripes_ + stripe] > 0) f(recent(copy, stripe));
  }

  int64_t rows_of_tile(int64_t tile) const { return std::min(kTileRows, problem_.p.n - tile * kTileRows); }

  // The sums of a stripe's columns over all copies; valid until the thread's next call.
  const double* column_totals(int64_t stripe) {
    double* const totals = scratch<double>(stripe_size());
    std::fill_n(totals, stripe_size(), 0.0);
    for_each_copy(stripe, [&](const auto* sums) {
      using Sum = std::remove_const_t<std::remove_pointer_t<decltype(sums)>>;
      tile_kernels<Sum>().add_sums(sums, stripe_size(), totals);
    });
    return totals;
  }

  // Sums over the rows of a stripe's columns to where these have their gradients.
  template <class Out>
  void write_stripe(const double* sums, int64_t count, const SideGradients<Out>& to, double mean_factor,
                    double variance_factor) const {
    const TileKernels<Out>& kernels = tile_kernels<Out>();
    const int64_t stride = packed_.stride();
    if (to.means) kernels.write_columns(sums, stride, count, dim_, mean_factor, to.add, to.means);
    sums += dim_ * stride;
    if (to.variances) kernels.write_columns(sums, stride, count, dim_, variance_factor, to.add, to.variances);
    sums += dim_ * stride;
    if (to.log_weights) kernels.write_sums(sums, count, 1, to.add, to.log_weights);
  }

  const Problem<T>& problem_;
  const PackedColumns<T>& packed_;
  const int64_t dim_;
  const int threads_;
  const int64_t stripes_, copies_;
  const int64_t merged_copies_;   // of the sums in float64; 0 where no copy has so many rows
  AlignedArray<double> rows_, columns_;
  AlignedArray<T> recent_;             // of the last rows, to be added to columns_
  std::vector<int64_t> recent_rows_;   // how many, per stripe; 0: there are no sums
  std::vector<char> has_rows_;         // per tile of rows, whether there are any
  std::vector<char> has_merged_;       // the same of columns_
};

}   // namespace csdiv::cpu
