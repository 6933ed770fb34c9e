// From the weights of pairs with full covariances to the gradients of both sides.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/cpu.h"
#include "cpu/full/full_pack.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/gradient_sums.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

// A tile of a sweep, rows counted over all problems.
struct FullTile {
  int64_t first_row, first_column, columns;
  const FullRows& rows;
  const FullColumns& packed;
};

// `fill(tile, memory)` tells the weights of a tile, which may lie in the memory, (count, blocks * lanes).
template <class Fill>
class FullGradientSweep {
 public:
  FullGradientSweep(const Problem<double>& problem, Pairs pairs, const SideGradients<double>& grad_p,
                    const SideGradients<double>& grad_q, int threads, const Fill& fill)
      : problem_(problem),
        pairs_(pairs),
        grad_p_(grad_p),
        grad_q_(grad_q),
        threads_(useful_threads(problem, threads)),
        fill_(fill),
        kernels_(full_kernels()),
        record_(record_size(problem.dim)),
        tiles_(num_full_tiles(problem)),
        packed_(problem, threads_),
        partition_(choose_partition(problem.p.n, problem.q.n, tiles_, packed_.chunks(), packed_.size(), grad_p.wanted(),
                                    grad_q.wanted())),
        row_sums_(grad_p.wanted() ? partition_.row_copies() * row_copy_size() : 0),
        column_sums_(grad_q.wanted() ? partition_.column_copies() * packed_.size() : 0) {
    fill_zero(row_sums_, threads_);
    fill_zero(column_sums_, threads_);
  }

  void run() {
    for_each_problem(problem_, grad_p_.wanted(), grad_q_.wanted(), threads_, [&](int64_t b) {
      for_each_block(partition_, threads_, [&](int64_t block, int64_t group) { sweep(b, block, group); });
    });
    if (grad_p_.wanted()) write_rows();
    if (grad_q_.wanted()) write_columns();
  }

 private:
  int64_t row_copy_size() const { return problem_.p.batch * problem_.p.n * record_; }

  void sweep(int64_t b, int64_t block, int64_t group) {
    const int64_t step = kernels_.lanes, p_item = problem_.p.item(b), q_item = problem_.q.item(b);
    const Part tiles = part(tiles_, partition_.row_blocks, block);
    const Part chunks = part(packed_.chunks(), partition_.column_groups, group);
    const bool rows_wanted = grad_p_.wanted(), covariances = grad_p_.variances || grad_q_.variances;
    double* const sums = scratch<double>(kFullRows * (record_ * (step + 1) + kFullColumns));
    double* const records = sums + kFullRows * record_ * step;
    double* const weights = records + kFullRows * record_;
    double* const to_rows =
        row_sums_.get() + (partition_.row_copies() > 1 ? group : 0) * row_copy_size() + p_item * problem_.p.n * record_;
    double* const to_columns = column_sums_.get() + (partition_.column_copies() > 1 ? block : 0) * packed_.size();
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const FullRows rows = full_rows(problem_, b, tile, records);
      const int64_t first = tile * kFullRows;
      std::fill_n(sums, rows.count * record_ * step, 0.0);
      for (int64_t chunk = first_chunk(pairs_, chunks, tile); chunk < chunks.end; ++chunk) {
        interruption_point();
        const FullColumns columns = packed_.chunk(q_item, chunk);
        double* const grad_columns = grad_q_.wanted() ? to_columns + packed_.offset(q_item, chunk) : nullptr;
        const FullWeights tile_weights = fill_(
            FullTile{b * problem_.p.n + first, chunk * kFullColumns, packed_.columns(chunk), rows, columns}, weights);
        kernels_.gradients(rows, columns, tile_weights, {rows_wanted ? sums : nullptr, grad_columns, covariances});
      }
      if (!rows_wanted) continue;
      for (int64_t k = 0; k < rows.count * record_; ++k)
        to_rows[first * record_ + k] =
            std::accumulate(sums + k * step, sums + (k + 1) * step, to_rows[first * record_ + k]);
    }
  }

  // Equations (5): delta = mu - nu, so the means of p take the minus sign.
  void write_rows() {
    parallel_for(problem_.p.batch * problem_.p.n, threads_, [&](int64_t k) {
      double* const sums = row_sums_.get() + k * record_;
      for (int64_t copy = 1; copy < partition_.row_copies(); ++copy)
        for (int64_t f = 0; f < record_; ++f) sums[f] += row_sums_.get()[copy * row_copy_size() + k * record_ + f];
      write(grad_p_, k, -1.0, sums, 1);
    });
  }

  void write_columns() {
    const int64_t step = kernels_.lanes, size = record_ * step, blocks = packed_.blocks();
    parallel_for(problem_.q.batch * blocks, threads_, [&](int64_t task) {
      double* const sums = column_sums_.get() + task * size;
      for (int64_t copy = 1; copy < partition_.column_copies(); ++copy)
        for (int64_t f = 0; f < size; ++f) sums[f] += column_sums_.get()[copy * packed_.size() + task * size + f];
      if (has_points(problem_)) kernels_.solve_sums(problem_.dim, packed_.block(task), sums);
      const int64_t item = task / blocks, first = task % blocks * step;
      for (int64_t j = 0; j < std::min(step, problem_.q.n - first); ++j)
        write(grad_q_, item * problem_.q.n + first + j, 1.0, sums + j, step);
    });
  }

  void write(const SideGradients<double>& grad, int64_t k, double sign, const double* sums, int64_t step) {
    const int64_t dim = problem_.dim;
    if (grad.means)
      for (int64_t i = 0; i < dim; ++i) write(grad, grad.means[k * dim + i], sign * sums[i * step]);
    if (grad.variances) {
      double* const to = grad.variances + k * dim * dim;
      for (int64_t i = 0; i < dim; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          const double sum = sums[(dim + triangle(i, j)) * step];
          write(grad, to[i * dim + j], problem_.q_factors ? sum : 0.5 * sum);
          if (i != j) to[j * dim + i] = problem_.q_factors ? 0.0 : to[i * dim + j];
        }
    }
    if (grad.log_weights) write(grad, grad.log_weights[k], sums[(record_ - 1) * step]);
  }

  static void write(const SideGradients<double>& grad, double& to, double value) { to = grad.add ? to + value : value; }

  const Problem<double>& problem_;
  const Pairs pairs_;
  const SideGradients<double>&grad_p_, &grad_q_;
  const int threads_;
  const Fill& fill_;
  const FullKernels& kernels_;
  const int64_t record_, tiles_;
  const PackedFullColumns packed_;
  const Partition partition_;
  AlignedArray<double> row_sums_;      // (row_copies, items of p, n, record)
  AlignedArray<double> column_sums_;   // (column_copies, as the columns are packed)
};

}   // namespace

void full_overlap_lse_backward(const Problem<double>& batched, const double* grad_row_lse, const double* row_lse,
                               const SideGradients<double>& grad_p, const SideGradients<double>& grad_q, int threads) {
  const auto fill = [&](const FullTile& tile, double*) {
    return FullWeights{row_lse + tile.first_row, grad_row_lse + tile.first_row};
  };
  FullGradientSweep(flattened(batched), Pairs::kAll, grad_p, grad_q, threads, fill).run();
}

void full_self_overlap_backward(const Problem<double>& problem, const double* grad_row_lse, const double* row_lse,
                                const SideGradients<double>& grad, int threads) {
  const FullKernels& kernels = full_kernels();
  const auto fill = [&](const FullTile& tile, double* weights) {
    const int64_t first = tile.first_row % problem.p.n, stride = tile.packed.blocks * kernels.lanes;
    const double *const totals = row_lse + tile.first_row, *const grads = grad_row_lse + tile.first_row;
    if (tile.first_column >= first + tile.rows.count) {
      for (int64_t r = 0; r < tile.rows.count; ++r) weights[r] = totals[r] - kLog2;
      return FullWeights{weights, grads};
    }
    kernels.logits(tile.rows, tile.packed, weights);
    for (int64_t r = 0; r < tile.rows.count; ++r) {
      double* const row = weights + r * stride;
      cut_to_upper_triangle(first + r, tile.first_column, tile.columns, row);
      for (int64_t j = 0; j < stride; ++j) row[j] = grads[r] == 0 ? 0.0 : grads[r] * std::exp(row[j] - totals[r]);
    }
    return FullWeights{nullptr, weights};
  };
  FullGradientSweep(problem, Pairs::kUpperTriangle, grad, grad.added_to(), threads, fill).run();
}

void full_pairwise_backward(const Problem<double>& batched, const double* grad_values,
                            const SideGradients<double>& grad_p, const SideGradients<double>& grad_q, int threads) {
  const int64_t m = batched.q.n, lanes = full_kernels().lanes;
  const auto fill = [&](const FullTile& tile, double* weights) {
    const int64_t stride = tile.packed.blocks * lanes;
    std::fill_n(weights, tile.rows.count * stride, 0.0);
    for (int64_t r = 0; r < tile.rows.count; ++r)
      std::copy_n(grad_values + (tile.first_row + r) * m + tile.first_column, tile.columns, weights + r * stride);
    return FullWeights{nullptr, weights};
  };
  FullGradientSweep(flattened(batched), Pairs::kAll, grad_p, grad_q, threads, fill).run();
}

}   // namespace csdiv::cpu
