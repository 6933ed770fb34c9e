#include "cpu/full/full_pack.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/dispatch.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

// Component k of all items, its numbers `step` apart; of a point the means alone.
void pack_record(const Mixture<double>& side, int64_t dim, int64_t k, double log_weight, double* to, int64_t step) {
  const double* const means = side.means + k * dim;
  const bool neutral = !counts(log_weight);
  for (int64_t i = 0; i < dim; ++i) to[i * step] = neutral ? 0.0 : means[i];
  if (!side.variances) return;
  const double* const covariance = side.variances + k * dim * dim;
  to += dim * step;
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j <= i; ++j) to[triangle(i, j) * step] = neutral ? double(i == j) : covariance[i * dim + j];
  to[triangle(dim) * step] = log_weight;
}

}   // namespace

FullRows full_rows(const Problem<double>& problem, int64_t b, int64_t tile, double* records) {
  const int64_t first = tile * kFullRows, count = std::min(kFullRows, problem.p.n - first), dim = problem.dim;
  for (int64_t r = 0; r < count; ++r)
    pack_record(problem.p, dim, problem.p.item(b) * problem.p.n + first + r, 0.0, records + r * record_size(dim), 1);
  bool one_covariance = true;
  if (has_points(problem)) return {records, count, dim, one_covariance};
  for (int64_t r = 1; r < count; ++r) {
    const double* const covariance = records + r * record_size(dim) + dim;
    one_covariance &= std::equal(covariance, covariance + triangle(dim), records + dim);
  }
  return {records, count, dim, one_covariance};
}

PackedFullColumns::PackedFullColumns(const Problem<double>& problem, int threads)
    : n_(problem.q.n),
      dim_(problem.dim),
      lanes_(full_kernels().lanes),
      blocks_(ceil_div(n_, lanes_)),
      factored_(has_points(problem)),
      factors_(problem.q_factors),
      records_(problem.q.batch * blocks_ * record_size(dim_) * lanes_) {
  parallel_for(problem.q.batch * blocks_, threads,
               [&](int64_t task) { pack(problem.q, task / blocks_, task % blocks_); });
}

void PackedFullColumns::pack(const Mixture<double>& q, int64_t item, int64_t block) {
  double* const to = records_.get() + (item * blocks_ + block) * record_size(dim_) * lanes_;
  for (int64_t lane = 0; lane < lanes_; ++lane) {
    const int64_t j = block * lanes_ + lane, k = std::min(j, n_ - 1);   // what fills the block is neutral
    pack_record(q, dim_, item * n_ + k, j < n_ ? q.log_weight(item, j) : -INFINITY, to + lane, lanes_);
  }
  const FullKernels& kernels = full_kernels();
  if (factored_) (factors_ ? kernels.invert_factors : kernels.factor_columns)(dim_, 1, to);
}

}   // namespace csdiv::cpu
