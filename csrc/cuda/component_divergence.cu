#include "gradient_sweep.h"
#include "pack.h"
#include "totals.h"

namespace csdiv::cuda {
namespace {

// Log variances that are exponentiated at most: equation (10).
template <class T>
constexpr T kCap = sizeof(T) == 4 ? T(85) : T(700);

// Kernels with a warp for a component of p, a lane for every 32nd of its dimensions.
CSDIV_DEVICE int64_t component_of_warp() {
  return (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
}
CSDIV_DEVICE int first_dim() {
  return threadIdx.x % kWarp;
}

template <class Number>
CSDIV_DEVICE Number warp_sum(Number x) {
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// own[k] = -sum_d log(s_d) / 4 of a component, and what a cap adds to -row_lse; `variances` of logarithms.
template <class T>
__global__ void own_terms_kernel(const T* given, bool logarithms, int64_t components, int64_t dim, T* variances,
                                 double* own) {
  const int64_t component = component_of_warp();
  if (component >= components) return;
  double sum = 0;
  int zeros = 0;
  for (int64_t d = first_dim(); d < dim; d += kWarp) {
    const T x = given[component * dim + d];
    if (logarithms) {
      const bool capped = x > kCap<T>;
      variances[component * dim + d] = exp(capped ? kCap<T> : x);
      sum += capped ? 0.25 * double(x) - 0.5 * double(kCap<T>) : -0.25 * double(x);
    } else if (x == 0) {
      ++zeros;
    } else {
      sum -= 0.25 * log(x < 0 ? double(NAN) : double(x));
    }
  }
  sum = warp_sum(sum);
  zeros = warp_sum(zeros);
  if (first_dim() == 0) own[component] = zeros > 0 ? double(INFINITY) : sum;
}

// D_CS but for -l_i. Where it is finite, row_lse leaves it out, which is then exact: minus the value.
template <class T>
CSDIV_DEVICE double own_part(const Problem<T>& problem, const double* own, int64_t row, double self_overlap) {
  const int64_t n = problem.p.n;
  return own[problem.p.item(row / n) * n + row % n] + 0.5 * self_overlap -
         0.25 * double(problem.dim) * (kLog2 + kLog2Pi);
}

// What a forward pass writes, and from what.
template <class T>
struct Divergences {
  const double* own;     // of p's components
  const double* known;   // log V(q, q) of each problem, or null
  const double* found;   // or of each item of q
  T* values;
  T* row_lse;
  double* self_overlaps;
};

// The task's problem may be `problem` flattened.
template <class T>
__global__ void combine_divergences_kernel(const __grid_constant__ RowTask<T> task,
                                           const __grid_constant__ Problem<T> problem, Divergences<T> out) {
  const bool first = task.partials.lane() == 0;
  const int64_t n = problem.p.n, row = task.partials.row_of_thread();
  const auto self_overlap = [&](int64_t b) { return out.known ? out.known[b] : out.found[problem.q.item(b)]; };
  if (first && row < problem.batch) out.self_overlaps[row] = self_overlap(row);
  if (row >= problem.batch * n) return;
  const int64_t rows = task.problem.p.n;
  const double log2_value = task.partials.row(row / rows, rows, row % rows).log2_value();
  if (!first) return;
  const double row_lse = kLog2 * log2_value + log_offset(task.problem, row / rows, false);
  const double part = own_part(problem, out.own, row, self_overlap(row / n));
  out.row_lse[row] = T(isfinite(part) ? row_lse - part : row_lse);
  out.values[row] = T(part - row_lse);
}

// row_lse with what it leaves out.
template <class T>
__global__ void restore_rows_kernel(const __grid_constant__ Problem<T> problem, const double* own,
                                    const double* self_overlaps, const T* row_lse, double* restored) {
  const int64_t n = problem.p.n, row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= problem.batch * n) return;
  const double part = own_part(problem, own, row, self_overlaps[row / n]);
  restored[row] = double(row_lse[row]) + (isfinite(part) ? part : 0);
}

using UpstreamShared = double[kThreads];

// A block for the n gradients of a problem: their sum, or half of it.
template <class T>
__global__ void sum_upstream_kernel(const T* grads, int64_t n, T* sums, double* halves) {
  CSDIV_SHARED(UpstreamShared, shared);
  const int lane = threadIdx.x;
  double sum = 0;
  for (int64_t i = lane; i < n; i += kThreads) sum += double(grads[blockIdx.x * n + i]);
  shared[lane] = sum;
  for (int step = kThreads / 2; step; step /= 2) {
    __syncthreads();
    if (lane < step) shared[lane] += shared[lane + step];
  }
  if (lane == 0 && sums) sums[blockIdx.x] = T(shared[0]);
  if (lane == 0 && halves) halves[blockIdx.x] = 0.5 * shared[0];
}

// From gradients of -sum_bi grad_values[b, i] row_lse[b, i] to p's variances to those with the own terms, to what was
// given. Only -log(s) / 4, capped or not, comes from the own terms; a component with a zero among its variances has
// none.
template <class T>
__global__ void own_gradients_kernel(Mixture<T> p, int64_t batch, int64_t dim, const T* given, bool logarithms,
                                     const T* grad_values, T* grads) {
  const int64_t component = component_of_warp();
  if (component >= p.items * p.n) return;
  const int64_t item = component / p.n, i = component % p.n, begin = component * dim, end = begin + dim;
  const bool own = p.own(batch);
  double upstream = 0;
  for (int64_t b = (own ? item : 0) + first_dim(); b < (own ? item + 1 : batch); b += kWarp)
    if (p.item(b) == item) upstream += double(grad_values[b * p.n + i]);
  int zeros = 0;
  for (int64_t d = begin + first_dim(); !logarithms && d < end; d += kWarp) zeros += given[d] == 0;
  const double quarter = warp_sum(zeros) > 0 ? 0 : 0.25 * warp_sum(upstream);
  for (int64_t d = begin + first_dim(); d < end; d += kWarp) {
    const T x = given[d];
    const double grad = double(grads[d]);
    if (!logarithms)
      grads[d] = T(grad - (quarter == 0 ? 0 : quarter / double(x)));
    else if (x > kCap<T>)
      grads[d] = T(quarter);
    else
      grads[d] = T((p.variances[d] == 0 ? 0 : grad * double(p.variances[d])) - quarter);
  }
}

// The own terms of p's components, which get their variances.
template <class T>
double* take_own_terms(Context& context, Problem<T>& problem, bool logarithms) {
  const int64_t components = problem.p.items * problem.p.n;
  double* const own = context.take<double>(components);
  T* const variances = context.take<T>(logarithms ? components * problem.dim : 0);
  launch(context, ceil_div(components * kWarp, kThreads), 0, own_terms_kernel<T>, problem.p.variances, logarithms,
         components, problem.dim, variances, own);
  if (logarithms) problem.p.variances = variances;
  return own;
}

// A batch of p against one q as one problem, whose rows share tiles.
template <class T>
Problem<T> flattened(Problem<T> problem) {
  if (problem.batch < 2 || !problem.p.own(problem.batch) || problem.q.items != 1) return problem;
  problem.p.n *= problem.batch;
  problem.batch = problem.p.items = 1;
  return problem;
}

// q with itself, a problem for each of its items if any are used, on a scale of their own.
template <class T>
Problem<T> with_itself(const Problem<T>& problem) {
  const Mixture<T> q = problem.q.alone();
  return {problem.batch > 0 ? q.items : 0, problem.dim, q, q, {}};
}

}   // namespace

template <class T>
void component_divergence_forward(Context& context, Problem<T> problem, bool logarithms, const double* known, T* values,
                                  T* row_lse, double* self_overlaps) {
  const double* const own = take_own_terms(context, problem, logarithms);
  Problem<T> pair = flattened(problem), self = with_itself(problem);
  pack(context, pair, known ? nullptr : &self);
  RowTasks<T> tasks{{{pair, false}, {self, true}}, known ? 1 : 2};
  sum_rows(context, tasks);
  double* const found = context.take<double>(known ? 0 : problem.q.items);
  if (!known) total_rows(context, RowTasks<T>{{tasks.tasks[1]}, 1}, Totals<T>{nullptr, found});
  const int64_t rows = problem.batch * (problem.p.n > 1 ? problem.p.n : 1);
  launch(context, tasks.tasks[0].partials.row_blocks(rows), 0, combine_divergences_kernel<T>, tasks.tasks[0], problem,
         Divergences<T>{own, known, found, values, row_lse, self_overlaps});
}

template <class T>
void component_divergence_backward(Context& context, Problem<T> problem, bool logarithms, const double* known,
                                   const T* grad_values, const T* row_lse, const double* self_overlaps,
                                   const SideGradients<T>& grad_p, const SideGradients<T>& grad_q, double* grad_known) {
  const T* const given = problem.p.variances;
  const double* const own = take_own_terms(context, problem, logarithms);
  const bool self_wanted = grad_q.wanted() && !known;
  Problem<T> pair = flattened(problem), self = with_itself(problem);
  pack(context, pair, self_wanted ? &self : nullptr);
  const int64_t components = problem.p.items * problem.p.n, rows = pair.batch * pair.p.n;
  double* const restored = context.take<double>(rows);
  launch(context, ceil_div(rows, kThreads), 0, restore_rows_kernel<T>, problem, own, self_overlaps, row_lse, restored);
  GradientTasks<T> tasks{{{pair, false, Weights::kOfRows, restored, grad_values}}, 1};
  tasks.tasks[0].rows_wanted = grad_p.wanted();
  tasks.tasks[0].columns_wanted = grad_q.wanted();

  T* const upstream = context.take<T>(self_wanted ? pair.batch : 0);
  if (self_wanted) {
    launch(context, pair.batch, sizeof(UpstreamShared), sum_upstream_kernel<T>, grad_values, pair.p.n, upstream,
           nullptr);
    tasks.tasks[tasks.count++] = {self,          true, Weights::kOfTotal, nullptr,      nullptr,
                                  self_overlaps, 1,    problem.q.index,   problem.batch};
  }
  if (grad_known)
    launch(context, problem.batch, sizeof(UpstreamShared), sum_upstream_kernel<T>, grad_values, problem.p.n, nullptr,
           grad_known);
  if (!grad_p.wanted() && !grad_q.wanted()) return;

  sweep_gradients(context, tasks);
  const GradientTask<T>&of_pair = tasks.tasks[0], &of_q = tasks.tasks[1];
  const GradientSources<T> to_p{{{of_pair.row_sums, true, false, -1}}, 1};
  const GradientSources<T> to_q{{{of_pair.column_sums, false, false, -1},
                                 {of_q.row_sums, true, true, 0.5, upstream},
                                 {of_q.column_sums, false, true, 0.5, upstream}},
                                self_wanted ? 3 : 1};
  GradientWrites<T> writes{{}, 0, pair.batch, pair.dim};
  writes.add(pair.p, to_p, grad_p);
  writes.add(pair.q, to_q, grad_q);
  write_gradients(context, writes);
  if (grad_p.variances)
    launch(context, ceil_div(components * kWarp, kThreads), 0, own_gradients_kernel<T>, problem.p, problem.batch,
           problem.dim, given, logarithms, grad_values, grad_p.variances);
}

CSDIV_INSTANTIATE(component_divergence_forward);
CSDIV_INSTANTIATE(component_divergence_backward);

}   // namespace csdiv::cuda
