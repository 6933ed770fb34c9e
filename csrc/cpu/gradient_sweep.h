// From the weights of pairs to the gradients of both sides: the driver behind every backward pass.
//
// Sums over rows are kept in T for the columns of one stripe, then in float64; sums over columns in T for up to
// kRowsPerMerge rows, then in float64.
//
// The weights are given, by values that an earlier pass has found; or this is the only pass. Then the rows are swept in
// slabs: the logits of a slab are computed and kept, their exponentials are summed, and the gradients of the slab
// follow. Weights of a scalar, whose value is known last, are relative to a reference that rises from slab to slab.
#pragma once

#include <algorithm>
#include <atomic>
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
constexpr double kRise = 8;               // nats that weights may exceed their reference by
constexpr int64_t kSlab = 1 << 20;        // logits that are kept at a time, if one tile of rows has not more

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
// only pass Fill is derived from this and offers more:
//   start(groups): called first, with the number of column groups.
//   logits(tile, group, terms, scales): writes terms, row r of which times exp(scales[r]) are the weights times the
//     total; and adds them to the total.
//   finish_rows(b, first, count): called after all columns of these rows, where each row has a total of its own; false
//     if one is not finite.
//   finish(): called after all tiles; false if a total is not finite.
//   log_total(b, i): of the row, or of the problem that row i of problem b belongs to.
struct OnlyPass {
  bool row_totals;   // each row has its own
  double factor;     // of what the sweep results in
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
        tiles_(num_row_tiles(problem)),
        slab_tiles_(kOnlyPass ? std::clamp(kSlab / slab_size(1), int64_t(1), std::max(tiles_, int64_t(1))) : tiles_),
        partition_(choose_partition(problem, packed_, slab_tiles_, rows_wanted_, columns_wanted_)),
        value_groups_(choose_partition(problem, packed_, tiles_, true, true).column_groups),
        merged_copies_(rows_per_copy() > kRowsPerMerge ? partition_.column_copies() : 0),
        row_sums_(rows_wanted_ ? problem.p.batch * problem.p.n * (2 * dim_ + 1) : 0),
        column_sums_(stripes_of_q_ * stripe_size() * merged_copies_),
        recent_sums_(stripes_of_q_ * stripe_size() * partition_.column_copies()),
        recent_rows_(stripes_of_q_ * partition_.column_copies()),
        row_references_(kOnlyPass && rows_wanted_ ? problem.p.batch * problem.p.n : 0, kNoReference),
        column_references_(kOnlyPass ? problem.q.batch : 0, kNoReference) {
    fill_zero(row_sums_);
    fill_zero(column_sums_);
    fill_zero(recent_sums_);
  }

  // False: this cannot be the only pass, and nothing was written. A total or a sum is not finite.
  bool run() {
    if constexpr (kOnlyPass) fill_.start(value_groups_);
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
      if (failed_ || !fill_.finish()) return false;
      if (!fill_.row_totals) scale_sums();
    }
    if (kOnlyPass && !(all_finite(row_sums_) && all_finite(column_sums_) && all_finite(recent_sums_))) return false;
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

  // Tiles begin ... end - 1 of a problem. In the only pass, with their terms, scales and the references of their rows.
  struct Slab {
    int64_t begin, end;
    AlignedArray<T> terms;         // (tiles, stripes, kTileRows, stride)
    AlignedArray<double> scales;   // (tiles, stripes, kTileRows)
    std::vector<double> references = {};
    AlignedArray<double> row_copies = {};   // sums of rows, where every column group has its own
  };

  struct RowSumsAt {
    double *means, *variances, *weights;
  };

  // Sums of an item's rows: (n, dim) for the means, (n, dim) for the variances, (n) for the weights.
  RowSumsAt rows_at(double* sums, int64_t n, int64_t first) const {
    return {sums + first * dim_, sums + (n + first) * dim_, sums + 2 * n * dim_ + first};
  }

  double* row_sums(int64_t item) { return row_sums_.get() + item * problem_.p.n * (2 * dim_ + 1); }

  int64_t slab_size(int64_t tiles) const { return tiles * packed_.stripes() * kTileRows * packed_.stride(); }

  // At most: of all problems, which may share q.
  int64_t rows_per_copy() const {
    const int64_t slabs = ceil_div(tiles_, std::max(slab_tiles_, int64_t(1)));
    return problem_.batch * slabs * ceil_div(slab_tiles_, partition_.column_copies()) * kTileRows;
  }

  int64_t stripe_size() const { return (2 * dim_ + 1) * packed_.stride(); }

  // Sums of a stripe's columns, likewise (dim, stride), (dim, stride) and (stride); stripes are counted over all items.
  double* column_sums(int64_t copy, int64_t stripe) {
    return column_sums_.get() + (copy * stripes_of_q_ + stripe) * stripe_size();
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

  // The sums of a stripe's columns over all copies; valid until the thread's next call.
  const double* column_totals(int64_t stripe) {
    double* const totals = scratch<double>(stripe_size());
    std::fill_n(totals, stripe_size(), 0.0);
    const auto add = [&](const auto* sums) {
      for (int64_t k = 0; k < stripe_size(); ++k) totals[k] += sums[k];
    };
    for (int64_t copy = 0; copy < merged_copies_; ++copy) add(column_sums(copy, stripe));
    for (int64_t copy = 0; copy < partition_.column_copies(); ++copy) add(recent_sums(copy, stripe));
    return totals;
  }

  // Scales the sums of an item's columns.
  void scale_columns(int64_t item, double factor) {
    parallel_for(packed_.stripes(), threads_, [&](int64_t s) {
      const int64_t stripe = item * packed_.stripes() + s;
      for (int64_t copy = 0; copy < partition_.column_copies(); ++copy) {
        T* const recent = recent_sums(copy, stripe);
        for (int64_t k = 0; k < stripe_size(); ++k) recent[k] *= T(factor);
      }
      for (int64_t copy = 0; copy < merged_copies_; ++copy) {
        double* const sums = column_sums(copy, stripe);
        for (int64_t k = 0; k < stripe_size(); ++k) sums[k] *= factor;
      }
    });
  }

  // All sums, from their references to the totals.
  void scale_sums() {
    for (int64_t item = 0; columns_wanted_ && item < problem_.q.batch; ++item)
      scale_columns(item, fill_.factor * std::exp(column_references_[item] - fill_.log_total(item, 0)));
    const int64_t n = problem_.p.n;
    parallel_for(int64_t(row_references_.size()), threads_, [&](int64_t row) {
      const double factor = fill_.factor * std::exp(row_references_[row] - fill_.log_total(row / n, row % n));
      const RowSumsAt sums = rows_at(row_sums(row / n), n, row % n);
      for (int64_t d = 0; d < dim_; ++d) {
        sums.means[d] *= factor;
        sums.variances[d] *= factor;
      }
      *sums.weights *= factor;
    });
  }

  template <class U>
  static bool all_finite(const AlignedArray<U>& sums) {
    bool finite = true;
    for (int64_t k = 0; k < sums.size(); ++k) finite &= std::abs(sums.get()[k]) <= std::numeric_limits<U>::max();
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
    for (int64_t begin = 0; begin < tiles_ && !failed_; begin += slab_tiles_) {
      const int64_t end = std::min(tiles_, begin + slab_tiles_);
      Slab slab{begin, end, AlignedArray<T>(kOnlyPass ? slab_size(end - begin) : 0),
                AlignedArray<double>(kOnlyPass ? slab_size(end - begin) / packed_.stride() : 0)};
      if constexpr (kOnlyPass) {
        find_terms(b, slab);
        if (!find_references(b, slab)) {
          failed_ = true;
          return;
        }
      }
      run_slab(b, slab);
    }
  }

  // Of a mixture with itself, stripes before the tile's diagonal are left out.
  int64_t first_stripe(int64_t tile) const { return pairs_ == Pairs::kAll ? 0 : tile * kTileRows / packed_.width(); }

  T* terms_at(const Slab& slab, int64_t tile, int64_t s) const {
    return slab.terms.get() + slab_size(tile - slab.begin) + s * kTileRows * packed_.stride();
  }

  double* scales_at(const Slab& slab, int64_t tile, int64_t s) const {
    return slab.scales.get() + ((tile - slab.begin) * packed_.stripes() + s) * kTileRows;
  }

  void find_terms(int64_t b, Slab& slab) {
    const int64_t blocks = value_blocks(slab.end - slab.begin);
    parallel_for(blocks * value_groups_, threads_, [&](int64_t task) {
      const int64_t group = task % value_groups_;
      const Part tiles = part(slab.end - slab.begin, blocks, task / value_groups_);
      const Part stripes = part(packed_.stripes(), value_groups_, group);
      for (int64_t s = stripes.begin; s < stripes.end; ++s) {
        const Stripe<T>& columns = packed_.stripe(problem_.q.item(b), s);
        for (int64_t tile = slab.begin + tiles.begin; tile < slab.begin + tiles.end; ++tile) {
          if (s < first_stripe(tile)) break;
          const RowTile<T> rows = row_tile(problem_, b, tile);
          const SweepTile<T> place{b, tile * kTileRows, s * packed_.width(), rows, columns, nullptr, nullptr};
          fill_.logits(place, group, terms_at(slab, tile, s), scales_at(slab, tile, s));
        }
      }
    });
  }

  // What the weights of each row are relative to: its total, or something near the largest weight. False if that is not
  // finite.
  bool find_references(int64_t b, Slab& slab) {
    const int64_t first = slab.begin * kTileRows, count = std::min(problem_.p.n, slab.end * kTileRows) - first;
    slab.references.assign(count, kNoReference);
    if (fill_.row_totals) {
      if (!fill_.finish_rows(b, first, count)) return false;
      for (int64_t k = 0; k < count; ++k) slab.references[k] = fill_.log_total(b, first + k);
      return true;
    }
    for (int64_t tile = slab.begin; tile < slab.end; ++tile) {
      for (int64_t s = first_stripe(tile); s < packed_.stripes(); ++s) {
        const double* const scales = scales_at(slab, tile, s);
        double* const references = slab.references.data() + (tile - slab.begin) * kTileRows;
        for (int64_t r = 0; r < std::min(kTileRows, problem_.p.n - tile * kTileRows); ++r) {
          if (!(scales[r] < std::numeric_limits<double>::infinity())) return false;
          references[r] = std::max(references[r], scales[r]);
        }
      }
    }
    if (columns_wanted_) {
      double& reference = column_references_[problem_.q.item(b)];
      const double largest = *std::max_element(slab.references.begin(), slab.references.end());
      if (largest > reference + kRise) {
        if (reference != kNoReference) scale_columns(problem_.q.item(b), std::exp(reference - largest));
        reference = largest;
      }
      std::fill(slab.references.begin(), slab.references.end(), reference);
    }
    if (rows_wanted_)
      std::copy(slab.references.begin(), slab.references.end(),
                row_references_.begin() + problem_.p.item(b) * problem_.p.n + first);
    return true;
  }

  void run_slab(int64_t b, Slab& slab) {
    const Partition& cut = partition_;
    const int64_t slab_rows = (slab.end - slab.begin) * kTileRows;
    const int64_t copies = rows_wanted_ && cut.row_copies() > 1 ? cut.row_copies() : 0;
    slab.row_copies = AlignedArray<double>(copies * slab_rows * (2 * dim_ + 1));
    fill_zero(slab.row_copies);
    const bool square = cut.phases > 1;
    for (int64_t phase = 0; phase < cut.phases; ++phase) {
      parallel_for(square ? cut.row_blocks : cut.row_blocks * cut.column_groups, threads_, [&](int64_t task) {
        const int64_t block = square ? task : task / cut.column_groups;
        const int64_t group = square ? (task + phase) % cut.column_groups : task % cut.column_groups;
        run_block(b, slab, block, group);
      });
    }
    if (copies > 0) merge_rows(b, slab, copies, slab_rows);
  }

  void merge_rows(int64_t b, const Slab& slab, int64_t copies, int64_t slab_rows) {
    double* const item = row_sums(problem_.p.item(b));
    parallel_for(slab.end - slab.begin, threads_, [&](int64_t tile) {
      const int64_t first = tile * kTileRows, row = slab.begin * kTileRows + first;
      const int64_t count = std::min(kTileRows, problem_.p.n - row);
      const RowSumsAt to = rows_at(item, problem_.p.n, row);
      for (int64_t copy = 0; copy < copies; ++copy) {
        const RowSumsAt from = rows_at(slab.row_copies.get() + copy * slab_rows * (2 * dim_ + 1), slab_rows, first);
        for (int64_t k = 0; k < count * dim_; ++k) to.means[k] += from.means[k];
        for (int64_t k = 0; k < count * dim_; ++k) to.variances[k] += from.variances[k];
        for (int64_t r = 0; r < count; ++r) to.weights[r] += from.weights[r];
      }
    });
  }

  void run_block(int64_t b, const Slab& slab, int64_t block, int64_t group) {
    const Part tiles = part(slab.end - slab.begin, partition_.row_blocks, block);
    const Part stripes = part(packed_.stripes(), partition_.column_groups, group);
    const int64_t column_copy = partition_.column_copies() > 1 ? block : 0;
    for (int64_t s = stripes.begin; s < stripes.end; ++s) {
      const int64_t stripe = problem_.q.item(b) * packed_.stripes() + s;
      const int64_t last_column = s * packed_.width() + packed_.stripe(0, s).count - 1;
      const int64_t tiles_end = pairs_ == Pairs::kAll ? slab.begin + tiles.end
                                                      : std::min(slab.begin + tiles.end, last_column / kTileRows + 1);
      for (int64_t tile = slab.begin + tiles.begin; tile < tiles_end; ++tile) {
        if (columns_wanted_) {
          int64_t& recent_rows = recent_rows_[column_copy * stripes_of_q_ + stripe];
          if (recent_rows + kTileRows > kRowsPerMerge) merge_recent(column_copy, stripe);
          recent_rows += kTileRows;
        }
        run_tile(b, slab, tile, s, group, column_copy);
      }
    }
  }

  void run_tile(int64_t b, const Slab& slab, int64_t tile, int64_t s, int64_t group, int64_t column_copy) {
    const int64_t first = tile * kTileRows, item = problem_.q.item(b);
    const RowTile<T> rows = row_tile(problem_, b, tile);
    const Stripe<T>& columns = packed_.stripe(item, s);
    SweepTile<T> place{b, first, s * packed_.width(), rows, columns, nullptr, nullptr};
    TileGradients<T> grads{};
    if (rows_wanted_) {
      const int64_t slab_rows = (slab.end - slab.begin) * kTileRows;
      const RowSumsAt sums = slab.row_copies.size() > 0
                                 ? rows_at(slab.row_copies.get() + group * slab_rows * (2 * dim_ + 1), slab_rows,
                                           first - slab.begin * kTileRows)
                                 : rows_at(row_sums(problem_.p.item(b)), problem_.p.n, first);
      grads.row_means = sums.means;
      grads.row_variances = sums.variances;
      place.row_sums = sums.weights;
    }
    if (columns_wanted_) {
      grads.column_means = recent_sums(column_copy, item * packed_.stripes() + s);
      grads.column_variances = grads.column_means + dim_ * columns.stride;
      place.column_sums = grads.column_variances + dim_ * columns.stride;
    }
    const TileKernels<T>& kernels = tile_kernels<T>();
    if constexpr (kOnlyPass) {
      T* const weights = terms_at(slab, tile, s);
      const double* const scales = scales_at(slab, tile, s);
      T factors[kTileRows];
      for (int64_t r = 0; r < rows.count; ++r) {
        const double reference = slab.references[first - slab.begin * kTileRows + r];
        factors[r] = scales[r] == kNoReference ? T(0) : T(std::exp(scales[r] - reference));
      }
      const uint32_t active = kernels.scale(rows, columns, factors, weights, place.column_sums, place.row_sums);
      kernels.gradients(rows, columns, weights, active, grads);
    } else {
      T* const weights = scratch<T>(kTileRows * packed_.stride());
      if (const uint32_t active = fill_(place, weights)) kernels.gradients(rows, columns, weights, active, grads);
    }
  }

  // Of a mixture with itself: what a component has as a column joins what it has as a row, before anything is rounded.
  void columns_to_rows() {
    const int64_t n = problem_.q.n, width = packed_.width(), stride = packed_.stride();
    parallel_for(problem_.q.batch * packed_.stripes(), threads_, [&](int64_t task) {
      const int64_t item = task / packed_.stripes(), s = task % packed_.stripes();
      const double* const from = column_totals(task);
      double* const to = row_sums(item);
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
      const double* const sums = row_sums(item);
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
      const double* const sums = column_totals(task);
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
  const int64_t stripes_of_q_;
  const int64_t tiles_, slab_tiles_;   // of a problem and of a slab
  const Partition partition_;          // of a slab
  const int64_t value_groups_;         // of columns, in the sums of values: as without gradients
  const int64_t merged_copies_;        // of the sums in float64; 0 where no copy has so many rows
  AlignedArray<double> row_sums_, column_sums_;
  AlignedArray<T> recent_sums_;                              // of the last rows, to be added to column_sums_
  std::vector<int64_t> recent_rows_;                         // how many, per stripe
  std::vector<double> row_references_, column_references_;   // log of what the sums are relative to
  std::atomic<bool> failed_{false};
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
