// The sums that a sweep over pairs adds up for the gradients of both sides, and how they become these gradients.
#pragma once

#include "cuda.h"

namespace csdiv::cuda {

// Sums over the pairs of each problem, before factors and signs: for every component dim values of sum_j w u, dim of
// sum_j w (u^2 - 1/c) and one of sum_j w. Blocks that run at once have different copies, which are added up at the end.
struct ComponentSums {
  double* sums;   // (problems, copies, n, 2 dim + 1)
  int64_t copies;

  CSDIV_HOST_DEVICE double* of(int64_t problem, int64_t copy, int64_t n, int64_t k, int64_t dim) const {
    return sums + ((problem * copies + copy) * n + k) * (2 * dim + 1);
  }
};

// Where the gradients of a side come from: sums of a task, times `factor` and the gradients of its values.
template <class T>
struct GradientSource {
  ComponentSums sums;
  bool of_rows;    // the means take the minus sign: delta = mu - nu
  bool of_items;   // sums are for each item of the side, not for each problem
  double factor;
  const T* grad_values = nullptr;   // (batch) or null: 1
};

template <class T>
struct GradientSources {
  GradientSource<T> sources[3];
  int count;
};

// The gradients of the sides of `batch` problems, all written in one launch.
template <class T>
struct GradientWrites {
  struct {
    Mixture<T> side;
    GradientSources<T> sources;
    SideGradients<T> grads;
    int64_t blocks;
  } sides[2];
  int count;
  int64_t batch, dim;

  void add(const Mixture<T>& side, const GradientSources<T>& sources, const SideGradients<T>& grads) {
    if (grads.wanted())
      sides[count++] = {side, sources, grads, ceil_div(side.items * side.n * (2 * dim + 1), int64_t(kThreads))};
  }
};

// Adds up the sources and writes the gradients.
template <class T>
void write_gradients(const Context& context, const GradientWrites<T>& writes);

}   // namespace csdiv::cuda
