#include "cuda.h"
#include "full_pair.h"

namespace csdiv::cuda {
namespace {

// The gradients of one side, `own`, whose components meet those of the other side: a pair is factored once for each
// side that has gradients, and in exchange all sums stay in registers.
struct FullSweep {
  Problem<double> problem;
  bool of_p;               // own is p
  const double* row_lse;   // (batch, n), or null: ...
  const double* grads;     // (batch, n) their gradients; (batch, n, m) of the pairs
  bool covariances;
  int64_t parts = 1;        // of the others
  double* sums = nullptr;   // (items, parts, n or m, record)

  CSDIV_HOST_DEVICE const Mixture<double>& own() const { return of_p ? problem.p : problem.q; }
  CSDIV_HOST_DEVICE const Mixture<double>& other() const { return of_p ? problem.q : problem.p; }

  // Problems that an item of its own side may be in: its own, or any.
  CSDIV_HOST_DEVICE int64_t problems() const { return own().own(problem.batch) ? 1 : problem.batch; }

  // The gradient of pair (i, j) of problem b, or that of its row.
  CSDIV_DEVICE double grad(int64_t b, int64_t i, int64_t j) const {
    const int64_t row = b * problem.p.n + i;
    return row_lse ? grads[row] : grads[row * problem.q.n + j];
  }

  // What a pair with this logit, base 2, weighs.
  CSDIV_DEVICE double weight(double logit, double grad, int64_t b, int64_t i) const {
    if (grad == 0 || logit == -INFINITY) return 0;
    if (!row_lse) return logit == logit ? grad : logit;
    const double row = row_lse[b * problem.p.n + i], share = logit - kLog2E * row;
    return row == -INFINITY ? 0 : grad * exp2(share > 0 ? 0 : share);   // no share exceeds 1 but by rounding
  }
};

// A warp for some components of the own side and a part of the others, problem after problem.
template <int kWidth>
__global__ void __launch_bounds__(kThreads, 1) full_backward_kernel(const __grid_constant__ FullSweep sweep) {
  CSDIV_SHARED(FullShared<kWidth>, shared);
  using Pair = FullPair<kWidth>;
  constexpr int kComponents = kWarpComponents<kWidth>;
  const Mixture<double>&own = sweep.own(), &other = sweep.other();
  const int64_t dim = sweep.problem.dim, tiles = ceil_div(own.n, kComponents), problems = sweep.problems();
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t its_part = warp % sweep.parts, tile = warp / sweep.parts % tiles, item = warp / sweep.parts / tiles;
  if (item >= own.items) return;
  const int64_t component = tile * kComponents + threadIdx.x % kWarp / Pair::kLanes;
  const int64_t k = component < own.n ? component : own.n - 1, at = item * own.n + k;
  Pair pair(int(dim), own.means + at * dim, own.variances + at * dim * dim, shared.own());
  typename Pair::Sums sums;
  const Part others = part(problems * other.n, sweep.parts, its_part);
  for (int64_t e = others.begin; e < others.end; ++e) {
    const int64_t b = problems == 1 ? item : e / other.n, l = problems == 1 ? e : e % other.n;
    if (own.item(b) != item) continue;
    const int64_t i = sweep.of_p ? k : l, j = sweep.of_p ? l : k, from = other.item(b) * other.n + l;
    const double log_weight = log2_weight(sweep.problem.q, sweep.problem.q.item(b), j);
    const double grad = sweep.grad(b, i, j);
    // The same in the whole warp: what counts nothing is not computed.
    if (sweep.of_p ? !counts(log_weight) : sweep.row_lse && grad == 0) continue;
    const double logit =
        log_weight + pair.log2_density(other.means + from * dim, other.variances + from * dim * dim, sweep.covariances);
    const double weight = sweep.weight(counts(log_weight) ? logit : log_weight, grad, b, i);
    pair.add_gradients(weight, sweep.covariances, sums);
  }
  if (component >= own.n) return;
  sums.write(sweep.sums + ((item * sweep.parts + its_part) * own.n + component) * record_size(dim), int(dim));
}

// A thread for each number of every component: the parts are added in order. delta is own mean - other mean on both
// sides, so the means take the minus sign, equations (5).
__global__ void full_write_gradients_kernel(const __grid_constant__ FullSweep sweep, SideGradients<double> grads) {
  const Mixture<double>& own = sweep.own();
  const int64_t dim = sweep.problem.dim, width = dim + dim * dim + 1;
  const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t component = element / width, at = element % width;
  if (component >= own.items * own.n) return;
  const bool of_mean = at < dim, of_weight = at == width - 1;
  double* const out = of_mean ? grads.means : of_weight ? grads.log_weights : grads.variances;
  if (!out) return;
  int64_t entry = of_mean ? at : record_size(dim) - 1;
  if (!of_mean && !of_weight) {
    const int64_t i = (at - dim) / dim, j = (at - dim) % dim;
    entry = dim + (i > j ? triangle(i, j) : triangle(j, i));
  }
  const int64_t item = component / own.n, k = component % own.n;
  double sum = 0;
  for (int64_t copy = 0; copy < sweep.parts; ++copy)
    sum += sweep.sums[((item * sweep.parts + copy) * own.n + k) * record_size(dim) + entry];
  if (of_mean)
    out[component * dim + at] = -sum;
  else if (of_weight)
    out[component] = sum;
  else
    out[component * dim * dim + at - dim] = 0.5 * sum;
}

void run(Context& context, FullSweep sweep, const SideGradients<double>& grads) {
  if (!grads.wanted()) return;
  const Mixture<double>& own = sweep.own();
  const int64_t dim = sweep.problem.dim;
  sweep.covariances = grads.variances;
  with_width(dim, [&](auto width) {
    const int64_t tiles = own.items * ceil_div(own.n, kWarpComponents<width()>);
    sweep.parts = choose_parts(context.processors, tiles, sweep.problems() * sweep.other().n);
    sweep.sums = context.take<double>(own.items * sweep.parts * own.n * record_size(dim));
    launch(context, ceil_div(tiles * sweep.parts, kWarps), sizeof(FullShared<width()>), full_backward_kernel<width()>,
           sweep);
  });
  const int64_t elements = own.items * own.n * (dim + dim * dim + 1);
  launch(context, ceil_div(elements, kThreads), 0, full_write_gradients_kernel, sweep, grads);
}

}   // namespace

void full_overlap_lse_backward(Context& context, const Problem<double>& problem, const double* grad_row_lse,
                               const double* row_lse, const SideGradients<double>& grad_p,
                               const SideGradients<double>& grad_q) {
  run(context, {problem, true, row_lse, grad_row_lse, false}, grad_p);
  run(context, {problem, false, row_lse, grad_row_lse, false}, grad_q);
}

void full_pairwise_backward(Context& context, const Problem<double>& problem, const double* grad_values,
                            const SideGradients<double>& grad_p, const SideGradients<double>& grad_q) {
  run(context, {problem, true, nullptr, grad_values, false}, grad_p);
  run(context, {problem, false, nullptr, grad_values, false}, grad_q);
}

}   // namespace csdiv::cuda
