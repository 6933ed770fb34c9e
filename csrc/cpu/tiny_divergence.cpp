#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/kernels/dispatch.h"
#include "cpu/system/memory.h"
#include "cpu/system/thread_pool.h"
#include "cpu/tiny.h"
#include "cpu/tiny_arrays.h"

namespace csdiv::cpu {
namespace {

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
  return for_groups<T>(problem, useful_threads(problem, threads), [&](const Part& problems) {
    return run(problem, problems, values, row_lse, overlaps, grad_p, grad_q);
  });
}

CSDIV_INSTANTIATE(is_tiny);
CSDIV_INSTANTIATE(tiny_divergence);

}   // namespace csdiv::cpu
