#include <algorithm>
#include <cmath>

#include "cpu/kernels/dispatch.h"
#include "cpu/system/memory.h"
#include "cpu/system/thread_pool.h"
#include "cpu/tiny.h"
#include "cpu/tiny_arrays.h"

namespace csdiv::cpu {
namespace {

constexpr int64_t kMaxNumbers = 1024;   // of the columns' means, so that a group of problems stays in the cache

// Asks for the cache lines of `size` numbers, to be read or written soon.
template <bool kWritten, class T>
void prefetch(const T* numbers, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t k = 0; k < size; k += kLine) __builtin_prefetch(numbers + k, kWritten, 2);
}

// Of the problems after these the inputs, and of these the gradients: there are more streams than hardware follows.
template <class T>
void prefetch(const Problem<T>& problem, const Part& problems, const SideGradients<T>& grads) {
  const int64_t numbers = problem.q.n * problem.dim, size = (problems.end - problems.begin) * numbers;
  const int64_t next = problems.end * numbers;
  const int64_t left = std::min(size, problem.batch * numbers - next);
  prefetch<false>(problem.q.means + next, left);
  prefetch<false>(problem.q.variances + next, left);
  if (grads.means) prefetch<true>(grads.means + problems.begin * numbers, size);
  if (grads.variances) prefetch<true>(grads.variances + problems.begin * numbers, size);
}

// At most as many problems as a vector has lanes; false: not possible, nothing was written.
template <class T>
bool run(const Problem<T>& problem, const Part& problems, const T* grad_row_lse, T* row_lse,
         const SideGradients<T>& grad_p, const SideGradients<T>& grad_q) {
  const TileKernels<T>& kernels = tile_kernels<T>();
  const int64_t lanes = kernels.lanes, dim = problem.dim, m = problem.q.n;
  const int64_t p_size = TinyArrays<T>::size(1, dim, lanes), q_size = TinyArrays<T>::size(m, dim, lanes);
  T* const memory = scratch<T>(p_size + q_size + (2 + m) * lanes);
  TinyArrays<T> p_arrays(memory, 1, dim, lanes), q_arrays(memory + p_size, m, dim, lanes);
  T* const values = memory + p_size + q_size;
  Problem<T> unweighted = problem;   // the row's own weight is not used
  unweighted.p.log_weights = nullptr;
  const TinySide<T> p = p_arrays.read(unweighted.p, problems, grad_p.wanted());
  const TinySide<T> q = q_arrays.read(problem.q, problems, grad_q.wanted());
  if (!kernels.certified(p_arrays.range(), q_arrays.range())) return false;

  int64_t exponents[kMaxLanes];
  T factors[kMaxLanes];
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t b = std::min(problems.begin + l, problems.end - 1);
    exponents[l] = (problem.p.scale_exponents[b] + problem.q.scale_exponents[b]) / 2;
    factors[l] = grad_row_lse ? grad_row_lse[b] : T(1);
  }
  prefetch(problem, problems, grad_q);
  kernels.tiny_overlap({p, q, dim, exponents, false, T(1), values + 2 * lanes, values, values + lanes});
  if (!std::all_of(values, values + lanes, [](T value) { return std::isfinite(value); })) return false;
  if (row_lse) std::copy_n(values, problems.end - problems.begin, row_lse + problems.begin);
  p_arrays.write(grad_p, problems, grad_row_lse ? factors : nullptr);
  q_arrays.write(grad_q, problems, grad_row_lse ? factors : nullptr);
  return true;
}

}   // namespace

template <class T>
bool has_tiny_rows(const Problem<T>& problem) {
  const auto own = [&](const Mixture<T>& side) { return side.batch == problem.batch && !side.index; };
  return problem.p.n == 1 && problem.batch >= tile_kernels<T>().lanes && own(problem.p) && own(problem.q) &&
         problem.q.n * problem.dim <= kMaxNumbers;
}

template <class T>
std::vector<Part> tiny_rows(const Problem<T>& problem, const T* grad_row_lse, T* row_lse,
                            const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, int threads) {
  return for_groups<T>(problem, useful_threads(problem, threads), [&](const Part& problems) {
    return run(problem, problems, grad_row_lse, row_lse, grad_p, grad_q);
  });
}

CSDIV_INSTANTIATE(has_tiny_rows);
CSDIV_INSTANTIATE(tiny_rows);

}   // namespace csdiv::cpu
