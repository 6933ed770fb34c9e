#include "gradient_sums.h"

namespace csdiv::cuda {
namespace {

// A thread for each value of every component.
template <class T>
__global__ void write_gradients_kernel(const __grid_constant__ GradientWrites<T> writes) {
  const int which = blockIdx.x < writes.sides[0].blocks ? 0 : 1;
  const int64_t block = blockIdx.x - which * writes.sides[0].blocks, batch = writes.batch, dim = writes.dim;
  const Mixture<T>& side = writes.sides[which].side;
  const GradientSources<T>& sources = writes.sides[which].sources;
  const SideGradients<T>& grads = writes.sides[which].grads;
  const int64_t width = 2 * dim + 1, element = block * kThreads + threadIdx.x;
  const int64_t component = element / width, at = element % width;
  if (component >= side.items * side.n) return;
  const int64_t item = component / side.n, k = component % side.n;
  T* const out = at < dim ? grads.means : at < 2 * dim ? grads.variances : grads.log_weights;
  if (!out) return;
  const bool own = side.own(batch);
  double total = 0;
  for (int s = 0; s < sources.count; ++s) {
    const GradientSource<T>& source = sources.sources[s];
    const auto sum_of = [&](int64_t problem) {
      double sum = 0;
      for (int64_t copy = 0; copy < source.sums.copies; ++copy)
        sum += source.sums.of(problem, copy, side.n, k, dim)[at];
      return sum;
    };
    double sum = 0, factor = 0;
    for (int64_t b = own ? item : 0; b < (own ? item + 1 : batch); ++b) {
      if (side.item(b) != item) continue;
      const double grad = source.grad_values ? double(source.grad_values[b]) : 1;
      factor += grad;
      if (!source.of_items && grad != 0) sum += grad * sum_of(b);
    }
    if (source.of_items && factor != 0) sum = factor * sum_of(item);
    total += source.factor * (source.of_rows && at < dim ? -sum : sum);
  }
  out[at < 2 * dim ? component * dim + at % dim : component] = T(at >= dim && at < 2 * dim ? 0.5 * total : total);
}

}   // namespace

template <class T>
void write_gradients(const Context& context, const GradientWrites<T>& writes) {
  int64_t blocks = 0;
  for (int k = 0; k < writes.count; ++k) blocks += writes.sides[k].blocks;
  launch(context, blocks, 0, write_gradients_kernel<T>, writes);
}

CSDIV_INSTANTIATE(write_gradients);

}   // namespace csdiv::cuda
