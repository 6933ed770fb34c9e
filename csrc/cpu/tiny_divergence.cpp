#include "lanes.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu.h"
#include "dispatch.h"
#include "memory.h"
#include "thread_pool.h"

namespace csdiv::cpu {
namespace {

// Memory for one side of a group of problems, and its gradients.
template <class T>
class LaneArrays {
 public:
  static int64_t size(int64_t n, int64_t dim, int64_t lanes) { return 2 * n * (2 * dim + 1) * lanes; }

  LaneArrays(T* memory, int64_t n, int64_t dim, int64_t lanes) : n_(n), dim_(dim), lanes_(lanes) {
    const int64_t values = n * dim * lanes;
    for (T** array : {&means_, &variances_, &grad_means_, &grad_variances_}) {
      *array = memory;
      memory += values;
    }
    log_weights_ = memory;
    grad_log_weights_ = memory + n * lanes;
  }

  // Problems first ... first + count - 1 of a side; the last one also stands in the lanes that are left over.
  LaneSide<T> read(const Mixture<T>& side, int64_t first, int64_t count, bool grads) {
    const int64_t values = n_ * dim_;
    fill(side.means + first * values, values, count, means_);
    fill(side.variances + first * values, values, count, variances_);
    if (side.log_weights)
      fill(side.log_weights + first * n_, n_, count, log_weights_);
    else
      std::fill_n(log_weights_, n_ * lanes_, T(0));
    if (!grads) return {means_, variances_, log_weights_, n_};
    for (T* array : {grad_means_, grad_variances_}) std::fill_n(array, values * lanes_, T(0));
    std::fill_n(grad_log_weights_, n_ * lanes_, T(0));
    return {means_, variances_, log_weights_, n_, grad_means_, grad_variances_, grad_log_weights_};
  }

  Range<T> range() const { return tile_kernels<T>().range(means_, variances_, n_ * dim_ * lanes_); }

  void write(const SideGradients<T>& grads, int64_t first, int64_t count) const {
    const int64_t values = n_ * dim_;
    if (grads.means) put(grad_means_, values, count, grads.means + first * values);
    if (grads.variances) put(grad_variances_, values, count, grads.variances + first * values);
    if (grads.log_weights) put(grad_log_weights_, n_, count, grads.log_weights + first * n_);
  }

 private:
  void fill(const T* from, int64_t values, int64_t count, T* to) const {
    tile_kernels<T>().transpose(from, count, values, to, lanes_);
    for (int64_t k = 0; count < lanes_ && k < values; ++k)
      std::fill_n(to + k * lanes_ + count, lanes_ - count, to[k * lanes_ + count - 1]);
  }

  void put(const T* from, int64_t values, int64_t count, T* to) const {
    if (count == lanes_) return tile_kernels<T>().transpose(from, values, lanes_, to, values);
    for (int64_t k = 0; k < values; ++k)
      for (int64_t l = 0; l < count; ++l) to[l * values + k] = from[k * lanes_ + l];
  }

  int64_t n_, dim_, lanes_;
  T *means_, *variances_, *grad_means_, *grad_variances_, *log_weights_, *grad_log_weights_;
};

// Problems first ... first + count - 1, each with items of its own.
template <class T>
Problem<T> slice(Problem<T> problem, int64_t first, int64_t count) {
  problem.batch = count;
  for (Mixture<T>* side : {&problem.p, &problem.q}) {
    side->means += first * side->n * problem.dim;
    side->variances += first * side->n * problem.dim;
    if (side->log_weights) side->log_weights += first * side->n;
    side->scale_exponents += first;
    if (side->precisions) side->precisions += first * side->n * problem.dim;
    if (side->log_determinants) side->log_determinants += first * side->n;
    side->batch = count;
  }
  return problem;
}

template <class T>
SideGradients<T> slice(SideGradients<T> grads, int64_t first, int64_t n, int64_t dim) {
  if (grads.means) grads.means += first * n * dim;
  if (grads.variances) grads.variances += first * n * dim;
  if (grads.log_weights) grads.log_weights += first * n;
  return grads;
}

template <class T>
class LaneDivergences {
 public:
  LaneDivergences(const Problem<T>& problem, T* divergence, T* rows, double* overlaps, const SideGradients<T>& grad_p,
                  const SideGradients<T>& grad_q)
      : problem_(problem),
        divergence_(divergence),
        rows_(rows),
        overlaps_(overlaps),
        grad_p_(grad_p),
        grad_q_(grad_q) {}

  // False: this group is to be computed term by term.
  bool run(int64_t first, int64_t count) const {
    const TileKernels<T>& kernels = tile_kernels<T>();
    const int64_t lanes = kernels.lanes, dim = problem_.dim, n = problem_.p.n, m = problem_.q.n, k = std::max(n, m);
    const int64_t p_size = LaneArrays<T>::size(n, dim, lanes), q_size = LaneArrays<T>::size(m, dim, lanes);
    T* memory = scratch<T>(p_size + q_size + (k * k + 2 * k + n + 3) * lanes);
    LaneArrays<T> p(memory, n, dim, lanes), q(memory + p_size, m, dim, lanes);
    memory += p_size + q_size;
    T* const values = memory;   // (3, lanes), as overlaps
    T* const rows = values + 3 * lanes;
    T* const self_rows = rows + n * lanes;
    T* const terms = self_rows + k * lanes;

    const LaneSide<T> left = p.read(problem_.p, first, count, grad_p_.wanted());
    const LaneSide<T> right = q.read(problem_.q, first, count, grad_q_.wanted());
    const Range<T> p_range = p.range(), q_range = q.range();
    for (const auto& [a, b] : {std::pair{p_range, q_range}, {p_range, p_range}, {q_range, q_range}})
      if (!kernels.certified(a, b)) return false;

    int64_t exponents[3][kMaxLanes];
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t b = first + std::min(l, count - 1);
      const int64_t own = problem_.p.scale_exponents[b], other = problem_.q.scale_exponents[b];
      exponents[0][l] = (own + other) / 2;
      exponents[1][l] = own;
      exponents[2][l] = other;
    }
    kernels.lane_overlap({left, right, dim, exponents[0], false, T(-1), terms, rows, values});
    kernels.lane_overlap({left, left, dim, exponents[1], true, T(0.5), terms, self_rows, values + lanes});
    kernels.lane_overlap({right, right, dim, exponents[2], true, T(0.5), terms, self_rows, values + 2 * lanes});
    if (!std::all_of(values, values + 3 * lanes, [](T value) { return std::isfinite(value); })) return false;

    for (int64_t l = 0; l < count; ++l) {
      double* const overlaps = overlaps_ + 3 * (first + l);
      for (int64_t term = 0; term < 3; ++term) overlaps[term] = values[term * lanes + l];
      divergence_[first + l] = T(0.5 * (overlaps[1] + overlaps[2]) - overlaps[0]);
      for (int64_t i = 0; i < n; ++i) rows_[(first + l) * n + i] = rows[i * lanes + l];
    }
    p.write(grad_p_, first, count);
    q.write(grad_q_, first, count);
    return true;
  }

  bool run_by_terms(int64_t first, int64_t count, int threads) const {
    const int64_t n = problem_.p.n, m = problem_.q.n, dim = problem_.dim;
    return cs_divergence_by_terms(slice(problem_, first, count), divergence_ + first, rows_ + first * n,
                                  overlaps_ + 3 * first, slice(grad_p_, first, n, dim), slice(grad_q_, first, m, dim),
                                  threads);
  }

 private:
  static constexpr int64_t kMaxLanes = 16;

  const Problem<T>& problem_;
  T *divergence_, *rows_;
  double* overlaps_;
  const SideGradients<T>&grad_p_, &grad_q_;
};

}   // namespace

template <class T>
bool fits_lanes(const Problem<T>& problem) {
  const auto fits = [&](const Mixture<T>& side) {
    return side.batch == problem.batch && !side.index && side.n > 0 && side.n <= kMaxLaneComponents;
  };
  return problem.batch >= tile_kernels<T>().lanes && problem.dim <= kMaxLaneDim && fits(problem.p) && fits(problem.q);
}

template <class T>
bool cs_divergence_in_lanes(const Problem<T>& problem, T* divergence, T* rows, double* overlaps,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  const int64_t lanes = tile_kernels<T>().lanes, groups = (problem.batch + lanes - 1) / lanes;
  const LaneDivergences<T> all(problem, divergence, rows, overlaps, grad_p, grad_q);
  const auto count = [&](int64_t group) { return std::min(lanes, problem.batch - group * lanes); };
  std::vector<char> done(groups);
  parallel_for(groups, useful_threads(problem, threads),
               [&](int64_t group) { done[group] = all.run(group * lanes, count(group)); });
  bool once = true;
  for (int64_t group = 0; group < groups; ++group)
    if (!done[group]) once &= all.run_by_terms(group * lanes, count(group), threads);
  return once;
}

template bool fits_lanes(const Problem<float>&);
template bool fits_lanes(const Problem<double>&);
template bool cs_divergence_in_lanes(const Problem<float>&, float*, float*, double*, const SideGradients<float>&,
                                     const SideGradients<float>&, int);
template bool cs_divergence_in_lanes(const Problem<double>&, double*, double*, double*, const SideGradients<double>&,
                                     const SideGradients<double>&, int);

}   // namespace csdiv::cpu
