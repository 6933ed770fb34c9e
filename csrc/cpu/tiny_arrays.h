// What a group of tiny problems, one in each lane of a vector, has in memory.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/partition.h"
#include "cpu/system/thread_pool.h"

namespace csdiv::cpu {

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

  // Times a factor for each problem, where there are any; a factor of zero gives zero.
  void write(const SideGradients<T>& grads, const Part& problems, const T* factors = nullptr) const {
    T* const to[3] = {grads.means, grads.variances, grads.log_weights};
    for (int k = 0; k < 3; ++k) {
      if (!to[k]) continue;
      if (factors) scale(grads_[k], sizes_[k], factors);
      put(grads_[k], sizes_[k], problems.end - problems.begin, to[k] + problems.begin * sizes_[k]);
    }
  }

 private:
  void fill(const T* from, int64_t size, int64_t count, T* to) const {
    tile_kernels<T>().transpose(from, size, count, size, to, lanes_);
    for (int64_t k = 0; count < lanes_ && k < size; ++k)
      std::fill_n(to + k * lanes_ + count, lanes_ - count, to[k * lanes_ + count - 1]);
  }

  void scale(T* values, int64_t size, const T* factors) const {
    for (int64_t k = 0; k < size; ++k)
      for (int64_t l = 0; l < lanes_; ++l) {
        T& value = values[k * lanes_ + l];
        value = factors[l] == 0 ? T(0) : factors[l] * value;
      }
  }

  void put(const T* from, int64_t size, int64_t count, T* to) const {
    if (count == lanes_) return tile_kernels<T>().transpose(from, lanes_, size, lanes_, to, size);
    for (int64_t k = 0; k < size; ++k)
      for (int64_t l = 0; l < count; ++l) to[l * size + k] = from[k * lanes_ + l];
  }

  const int64_t sizes_[3], lanes_;
  T *values_[3], *grads_[3];
};

// run(problems) for each group of as many as a vector has lanes; the groups for which it returned false.
template <class T, class Run>
std::vector<Part> for_groups(const Problem<T>& problem, int threads, const Run& run) {
  const int64_t lanes = tile_kernels<T>().lanes, groups = ceil_div(problem.batch, lanes);
  const auto problems = [&](int64_t group) {
    return Part{group * lanes, std::min((group + 1) * lanes, problem.batch)};
  };
  std::vector<char> done(groups);
  parallel_for(groups, threads, [&](int64_t group) { done[group] = run(problems(group)); });
  std::vector<Part> rest;
  for (int64_t group = 0; group < groups; ++group)
    if (!done[group]) rest.push_back(problems(group));
  return rest;
}

}   // namespace csdiv::cpu
