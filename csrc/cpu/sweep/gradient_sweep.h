// From the weights of pairs to the gradients of both sides: the driver behind every backward pass.
//
// The weights are given, by values that an earlier pass has found; or one pass finds both, a fused one. Then the rows
// are swept in slabs: the logits of a slab are computed and kept, their exponentials are summed, and the gradients of
// the slab follow. Weights of a scalar, whose value is known last, are relative to a reference that rises from slab to
// slab.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/gradient_sums.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {

constexpr double kRise = 8;                                 // nats that weights may exceed their reference by
constexpr int64_t kSlab = 5 << 18, kCachedSlab = 1 << 18;   // logits that are kept at a time
constexpr int64_t kRound = 2 * kCopies;                     // tiles of a slab that blocks share evenly

// One tile of a sweep, and where the sums of its weights go (null: not wanted).
template <class T>
struct SweepTile {
  int64_t problem;
  int64_t first_row, first_column;
  const RowTile<T>& rows;
  const Stripe<T>& columns;
  double* row_sums = nullptr;
  T* column_sums = nullptr;

  // Of a mixture with itself, the column of the tile that holds the pair of row r with itself; it may lie outside.
  int64_t diagonal(int64_t r) const { return first_row + r - first_column; }
};

// The weights of a tile. Given ones: fill(tile, weights) writes them and returns the mask of rows that have any. In a
// fused pass Fill is derived from this and offers more:
//   start(groups): called first, with the number of column groups.
//   logits(tile, group, terms, scales): writes terms, row r of which times exp(scales[r]) are the weights times the
//     total; and adds them to the total.
//   log_total(b, i): of the row, or of the problem that row i of problem b belongs to.
struct FusedPass {
  bool row_totals;   // each row has its own
  double factor;     // of what the sweep results in

  // After all columns of these rows, where each row has a total of its own; false if one is not finite.
  bool finish_rows(int64_t /*b*/, int64_t /*first*/, int64_t /*count*/) { return true; }
  // After all tiles; false if a total is not finite.
  bool finish() { return true; }
};

template <class T, class Fill>
class GradientSweep {
  static constexpr bool kFusedPass = std::is_base_of_v<FusedPass, Fill>;

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
        packed_(problem, log_weights, Products::kYes),
        rows_wanted_(grad_p.wanted()),
        columns_wanted_(grad_q.wanted()),
        tiles_(num_row_tiles(problem)),
        tile_rows_(tiles_ == 1 ? problem.p.n : kTileRows),
        slab_tiles_(kFusedPass ? tiles_of_slab() : tiles_),
        partition_(choose_partition(problem, packed_, slab_tiles_, rows_wanted_, columns_wanted_)),
        value_groups_(value_groups(problem, packed_)),
        by_stripes_(is_by_stripes()),
        sums_(problem, packed_, rows_wanted_, columns_wanted_ && !by_stripes_, partition_.column_copies(),
              rows_per_copy(), threads),
        row_references_(kFusedPass && rows_wanted_ ? problem.p.batch * problem.p.n : 0, kNoReference),
        column_references_(kFusedPass ? problem.q.batch : 0, kNoReference) {
    if (!by_stripes_) packed_.pack_all(problem, threads);
  }

  // False: a fused pass cannot do it, a total or a sum is not finite. Gradients were not added to then.
  bool run() {
    if constexpr (kFusedPass) fill_.start(value_groups_);
    for_each_problem(problem_, rows_wanted_, columns_wanted_, threads_, [&](int64_t b) { run_problem(b); });
    if constexpr (kFusedPass)
      if (failed_ || !fill_.finish()) return false;
    sums_.zero_the_rest();
    if constexpr (kFusedPass) {
      if (!fill_.row_totals) scale_sums();
      if (!sums_.finite()) return false;
    }
    if (pairs_ == Pairs::kUpperTriangle) {
      sums_.columns_to_rows();
      sums_.write_rows(grad_p_);
      return true;
    }
    if (rows_wanted_) sums_.write_rows(grad_p_);
    if (columns_wanted_) sums_.write_columns(grad_q_);
    return true;
  }

 private:
  static constexpr double kNoReference = -std::numeric_limits<double>::infinity();

  // Tiles begin ... end - 1 of a problem. In a fused pass, with their terms, scales and the references of their rows.
  struct Slab {
    int64_t begin, end;
    std::vector<RowTile<T>> rows;
    AlignedArray<T> terms;         // (tiles, stripes, rows of a tile, stride)
    AlignedArray<double> scales;   // (tiles, stripes, kTileRows)
    std::vector<double> references = {};
    AlignedArray<double> row_copies = {};   // sums of rows, where every column group has its own
  };

  // Logits stay in the cache where the sums of columns do. Every slab reads all columns and adds to their sums: if
  // these are many numbers, as many logits are kept. Whole rounds of tiles leave no thread without one.
  int64_t tiles_of_slab() const {
    const int64_t tile = std::max(slab_size(1), int64_t(1)), columns = column_numbers();
    if (may_be_by_stripes() && slab_size(tiles_) <= std::max(kSlab, 2 * columns)) return tiles_;
    int64_t tiles = std::max(kSlab, columns) / tile;
    if (kCopies * columns <= kSlab) tiles = std::min(tiles, ceil_div(kCachedSlab, tile * kRound) * kRound);
    if (tiles > kRound) tiles = tiles / kRound * kRound;
    return std::clamp(tiles, int64_t(1), std::max(tiles_, int64_t(1)));
  }

  int64_t slab_size(int64_t tiles) const { return tiles * packed_.stripes() * tile_rows_ * packed_.stride(); }

  int64_t column_numbers() const { return 2 * dim_ * packed_.stripes() * packed_.stride(); }

  // Whether each stripe belongs to one problem, whose weights are final when they are found: then the stripes of few
  // rows are packed where they are read, and their gradients written where they are summed. Neither is kept.
  bool may_be_by_stripes() const {
    if constexpr (kFusedPass)   // which reads all stripes twice
      if (!fill_.row_totals || column_numbers() <= kCachedSlab) return false;
    return pairs_ == Pairs::kAll && problem_.batch == problem_.q.batch && !problem_.q.index && !grad_q_.add &&
           tiles_ > 0 && problem_.q.n >= kLopsided * problem_.p.n && problem_.p.n <= kRowsPerMerge;
  }

  bool is_by_stripes() const {
    return may_be_by_stripes() && slab_tiles_ == tiles_ && partition_.row_blocks == 1 &&
           (!kFusedPass || value_blocks(tiles_, value_groups_) == 1);
  }

  // At most: of all problems, which may share q.
  int64_t rows_per_copy() const {
    const int64_t slabs = ceil_div(tiles_, std::max(slab_tiles_, int64_t(1)));
    return problem_.batch * slabs * ceil_div(slab_tiles_, partition_.column_copies()) * kTileRows;
  }

  // All sums, from their references to the totals.
  void scale_sums() {
    for (int64_t item = 0; columns_wanted_ && item < problem_.q.batch; ++item)
      sums_.scale_columns(item, fill_.factor * std::exp(column_references_[item] - fill_.log_total(item, 0)));
    const int64_t n = problem_.p.n;
    const int64_t rows = int64_t(row_references_.size());
    parallel_for(rows, threads_for(rows * dim_, threads_), [&](int64_t row) {
      const double factor = fill_.factor * std::exp(row_references_[row] - fill_.log_total(row / n, row % n));
      sums_.rows(row / n, row % n).scale(factor, dim_);
    });
  }

  void run_problem(int64_t b) {
    for (int64_t begin = 0; begin < tiles_ && !failed_; begin += slab_tiles_) {
      const int64_t end = std::min(tiles_, begin + slab_tiles_);
      Slab slab{begin, end, std::vector<RowTile<T>>(end - begin),
                AlignedArray<T>(kFusedPass ? slab_size(end - begin) : 0),
                AlignedArray<double>(kFusedPass ? (end - begin) * packed_.stripes() * kTileRows : 0)};
      const int threads = threads_for((end - begin) * kTileRows * dim_, threads_);
      parallel_for(end - begin, threads, [&](int64_t task) { slab.rows[task] = row_tile(problem_, b, begin + task); });
      if constexpr (kFusedPass) {
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
    return slab.terms.get() + slab_size(tile - slab.begin) + s * tile_rows_ * packed_.stride();
  }

  double* scales_at(const Slab& slab, int64_t tile, int64_t s) const {
    return slab.scales.get() + ((tile - slab.begin) * packed_.stripes() + s) * kTileRows;
  }

  void find_terms(int64_t b, Slab& slab) {
    const int64_t blocks = value_blocks(slab.end - slab.begin, value_groups_);
    parallel_for(blocks * value_groups_, threads_, [&](int64_t task) {
      const int64_t group = task % value_groups_;
      const Part tiles = part(slab.end - slab.begin, blocks, task / value_groups_);
      const Part stripes = part(packed_.stripes(), value_groups_, group);
      const AlignedArray<T> memory = packed_.memory_of_stripe();
      for (int64_t s = stripes.begin; s < stripes.end; ++s) {
        Stripe<T> columns = packed_.stripe(problem_, problem_.q.item(b), s, memory.get());
        for (int64_t tile = slab.begin + tiles.begin; tile < slab.begin + tiles.end; ++tile) {
          if (s < first_stripe(tile)) break;
          interruption_point();
          const SweepTile<T> place{b, tile * kTileRows, s * packed_.width(), slab.rows[tile - slab.begin], columns};
          fill_.logits(place, group, terms_at(slab, tile, s), scales_at(slab, tile, s));
          columns.upcoming = 0;
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
        if (reference != kNoReference) sums_.scale_columns(problem_.q.item(b), std::exp(reference - largest));
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
    slab.row_copies = AlignedArray<double>(copies * RowGradientSums::size(slab_rows, dim_));
    fill_zero(slab.row_copies, threads_);
    for_each_block(cut, threads_, [&](int64_t block, int64_t group) { run_block(b, slab, block, group); });
    if (copies > 0) merge_rows(b, slab, copies);
  }

  // Sums of the rows of a slab from its tile `tile` on, of one column group.
  RowGradientSums rows_of_copy(const Slab& slab, int64_t copy, int64_t tile) const {
    const int64_t n = (slab.end - slab.begin) * kTileRows;
    return RowGradientSums::at(slab.row_copies.get() + copy * RowGradientSums::size(n, dim_), n, dim_,
                               (tile - slab.begin) * kTileRows);
  }

  void merge_rows(int64_t b, const Slab& slab, int64_t copies) {
    const int threads = threads_for(copies * (slab.end - slab.begin) * kTileRows * dim_, threads_);
    parallel_for(slab.end - slab.begin, threads, [&](int64_t task) {
      const int64_t tile = slab.begin + task, first = tile * kTileRows;
      const RowGradientSums to = sums_.rows_for_tile(problem_.p.item(b), tile);
      for (int64_t copy = 0; copy < copies; ++copy)
        to.add(rows_of_copy(slab, copy, tile), std::min(kTileRows, problem_.p.n - first), dim_);
    });
  }

  void run_block(int64_t b, const Slab& slab, int64_t block, int64_t group) {
    const Part tiles = part(slab.end - slab.begin, partition_.row_blocks, block);
    const Part stripes = part(packed_.stripes(), partition_.column_groups, group);
    const int64_t column_copy = partition_.column_copies() > 1 ? block : 0, item = problem_.q.item(b);
    const bool own_sums = by_stripes_ && columns_wanted_;
    const AlignedArray<T> memory = packed_.memory_of_stripe(), sums_memory(own_sums ? sums_.stripe_size() : 0);
    for (int64_t s = stripes.begin; s < stripes.end; ++s) {
      Stripe<T> columns = packed_.stripe(problem_, item, s, memory.get());
      const int64_t last_column = s * packed_.width() + columns.count - 1;
      const int64_t tiles_end = pairs_ == Pairs::kAll ? slab.begin + tiles.end
                                                      : std::min(slab.begin + tiles.end, last_column / kTileRows + 1);
      ColumnGradientSums<T> sums{};
      if (own_sums) sums = sums_.columns_in(sums_memory.get());
      for (int64_t tile = slab.begin + tiles.begin; tile < tiles_end; ++tile) {
        if (columns_wanted_ && !own_sums) sums = sums_.columns_for_tile(column_copy, item * packed_.stripes() + s);
        run_tile(b, slab, tile, s, group, columns, sums);
        columns.upcoming = 0;
      }
      if (!own_sums) continue;
      if (kFusedPass && !tile_kernels<T>().finite(sums_memory.get(), sums_memory.size())) failed_ = true;
      sums_.write_final(grad_q_, item, s, sums);
    }
  }

  void run_tile(int64_t b, const Slab& slab, int64_t tile, int64_t s, int64_t group, const Stripe<T>& columns,
                const ColumnGradientSums<T>& column_sums) {
    interruption_point();
    const int64_t first = tile * kTileRows;
    const RowTile<T>& rows = slab.rows[tile - slab.begin];
    SweepTile<T> place{b, first, s * packed_.width(), rows, columns};
    TileGradients<T> grads{};
    grads.variances_wanted = grad_p_.variances || grad_q_.variances;
    if (pairs_ == Pairs::kUpperTriangle) grads.first_column = first_in_triangle<T>(place.diagonal(0));
    if (rows_wanted_) {
      const RowGradientSums sums =
          slab.row_copies.size() > 0 ? rows_of_copy(slab, group, tile) : sums_.rows_for_tile(problem_.p.item(b), tile);
      grads.row_means = sums.means;
      grads.row_variances = sums.variances;
      place.row_sums = sums.weights;
    }
    grads.column_means = column_sums.means;
    grads.column_variances = column_sums.variances;
    place.column_sums = column_sums.weights;
    const TileKernels<T>& kernels = tile_kernels<T>();
    if constexpr (kFusedPass) {
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

  const Problem<T>& problem_;
  const Pairs pairs_;
  const SideGradients<T> grad_p_, grad_q_;
  const int threads_;
  Fill& fill_;
  const int64_t dim_;
  PackedColumns<T> packed_;
  const bool rows_wanted_, columns_wanted_;
  const int64_t tiles_, tile_rows_;   // of a problem; rows of the tiles whose terms are kept
  const int64_t slab_tiles_;          // of a slab
  const Partition partition_;         // of a slab
  const int64_t value_groups_;        // of columns, in the sums of values: as without gradients
  const bool by_stripes_;
  GradientSums<T> sums_;
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
