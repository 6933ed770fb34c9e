#include "cpu/tiny_divergence.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/kernels/dispatch.h"
#include "cpu/system/memory.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kMaxLanes = 16;

// Memory for one side of a group of problems, and its gradients: means, variances and log weights of each.
template <class T>
class TinyArrays {
 public:
  static int64_t size(int64_t n, int64_t dim, int64_t lanes) { return 2 * n * (2 * dim + 1) * lanes; }

  TinyArrays(T* memory, int64_t n, int64_t dim, int64_t lanes) : sizes_{n * dim, n * dim, n}, lanes_(lanes) {
    for (T** arrays : {values_, grads_}) {
      for (int k = 0; k < 3; ++k) {
        arrays[k] = memory;
        memory += sizes_[k] * lanes;
      }
    }
  }

  // These problems of a side; the last one also stands in the lanes that are left over.
  TinySide<T> read(const Mixture<T>& side, const Part& problems, bool grads) {
    const T* const from[3] = {side.means, side.variances, side.log_weights};
    for (int k = 0; k < 3; ++k) {
      if (from[k])
        fill(from[k] + problems.begin * sizes_[k], sizes_[k], problems.end - problems.begin, values_[k]);
      else
        std::fill_n(values_[k], sizes_[k] * lanes_, T(0));
      if (grads) std::fill_n(grads_[k], sizes_[k] * lanes_, T(0));
    }
    TinySide<T> read{values_[0], values_[1], values_[2], side.n};
    if (grads) read.grad_means = grads_[0], read.grad_variances = grads_[1], read.grad_log_weights = grads_[2];
    return read;
  }

  Range<T> range() const { return tile_kernels<T>().range(values_[0], values_[1], sizes_[0] * lanes_); }

  void write(const SideGradients<T>& grads, const Part& problems) const {
    T* const to[3] = {grads.means, grads.variances, grads.log_weights};
    for (int k = 0; k < 3; ++k)
      if (to[k]) put(grads_[k], sizes_[k], problems.end - problems.begin, to[k] + problems.begin * sizes_[k]);
  }

 private:
  void fill(const T* from, int64_t size, int64_t count, T* to) const {
    tile_kernels<T>().transpose(from, count, size, to, lanes_);
    for (int64_t k = 0; count < lanes_ && k < size; ++k)
      std::fill_n(to + k * lanes_ + count, lanes_ - count, to[k * lanes_ + count - 1]);
  }

  void put(const T* from, int64_t size, int64_t count, T* to) const {
    if (count == lanes_) return tile_kernels<T>().transpose(from, size, lanes_, to, size);
    for (int64_t k = 0; k < size; ++k)
      for (int64_t l = 0; l < count; ++l) to[l * size + k] = from[k * lanes_ + l];
  }

  const int64_t sizes_[3], lanes_;
  T *values_[3], *grads_[3];
};

// At most as many problems as a vector has lanes; false: not possible, nothing was written.
template <class T>
bool run(const Problem<T>& problem, const Part& problems, T* divergence, T* row_lse, double* overlaps,
         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t lanes = kernels.lanes, dim = problem.dim, n = problem.p.n, m = problem.q.n, k = std::max(n, m);
  const int64_t p_size = TinyArrays<T>::size(n, dim, lanes), q_size = TinyArrays<T>::size(m, dim, lanes);
  T* const memory = scratch<T>(p_size + q_size + (3 + n + k + k * k) * lanes);
  TinyArrays<T> p_arrays(memory, n, dim, lanes), q_arrays(memory + p_size, m, dim, lanes);
  T* const values = memory + p_size + q_size;   // (3, lanes), as overlaps
  T* const rows = values + 3 * lanes;
  T* const self_rows = rows + n * lanes;
  T* const terms = self_rows + k * lanes;

  const TinySide<T> p = p_arrays.read(problem.p, problems, grad_p.wanted());
  const TinySide<T> q = q_arrays.read(problem.q, problems, grad_q.wanted());
  const Range<T> p_range = p_arrays.range(), q_range = q_arrays.range();
  for (const auto& [a, b] : {std::pair{p_range, q_range}, {p_range, p_range}, {q_range, q_range}})
    if (!kernels.certified(a, b)) return false;

  int64_t exponents[3][kMaxLanes];
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t b = std::min(problems.begin + l, problems.end - 1);
    exponents[1][l] = problem.p.scale_exponents[b];
    exponents[2][l] = problem.q.scale_exponents[b];
    exponents[0][l] = (exponents[1][l] + exponents[2][l]) / 2;
  }
  kernels.tiny_overlap({p, q, dim, exponents[0], false, T(-1), terms, values, rows});
  kernels.tiny_overlap({p, p, dim, exponents[1], true, T(0.5), terms, values + lanes, self_rows});
  kernels.tiny_overlap({q, q, dim, exponents[2], true, T(0.5), terms, values + 2 * lanes, self_rows});
  if (!std::all_of(values, values + 3 * lanes, [](T value) { return std::isfinite(value); })) return false;

  for (int64_t b = problems.begin; b < problems.end; ++b) {
    const int64_t l = b - problems.begin;
    for (int64_t term = 0; term < 3; ++term) overlaps[3 * b + term] = values[term * lanes + l];
    divergence[b] = T(0.5 * (overlaps[3 * b + 1] + overlaps[3 * b + 2]) - overlaps[3 * b]);
    for (int64_t i = 0; i < n; ++i) row_lse[b * n + i] = rows[i * lanes + l];
  }
  p_arrays.write(grad_p, problems);
  q_arrays.write(grad_q, problems);
  return true;
}

}   // namespace

template <class T>
bool is_tiny(const Problem<T>& problem) {
  const auto fits = [&](const Mixture<T>& side) {
    return side.batch == problem.batch && !side.index && side.n > 0 && side.n <= kMaxTinyComponents;
  };
  return problem.batch >= tile_kernels<T>().lanes && problem.dim <= kMaxTinyDim && fits(problem.p) && fits(problem.q);
}

template <class T>
std::vector<Part> tiny_divergence(const Problem<T>& problem, T* values, T* row_lse, double* overlaps,
                                  const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  const int64_t lanes = tile_kernels<T>().lanes, groups = ceil_div(problem.batch, lanes);
  const auto problems = [&](int64_t group) {
    return Part{group * lanes, std::min((group + 1) * lanes, problem.batch)};
  };
  std::vector<char> done(groups);
  parallel_for(groups, useful_threads(problem, threads), [&](int64_t group) {
    done[group] = run(problem, problems(group), values, row_lse, overlaps, grad_p, grad_q);
  });
  std::vector<Part> rest;
  for (int64_t group = 0; group < groups; ++group)
    if (!done[group]) rest.push_back(problems(group));
  return rest;
}

CSDIV_INSTANTIATE(is_tiny);
CSDIV_INSTANTIATE(tiny_divergence);

}   // namespace csdiv::cpu
