// The module csdiv._C: raw pointers, sizes and a number of threads; no torch. csdiv/backends/cpu.py is its only caller.
//
// A side is the tuple (means, variances, log_weights, index, batch, n, same_dims, same_components), see mixture.h;
// pointers are integers, 0 where an array is not given. `itemsize` is 4 (float) or 8 (double).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "arguments.h"
#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/sweep/pack.h"
#include "cpu/sweep/scale.h"
#include "cpu/system/thread_pool.h"
#ifdef CSDIV_WITH_CUDA
#include "cuda/bindings.h"
#endif

namespace csdiv {
namespace {

using cpu::Mixture;
using cpu::Problem;
using cpu::SideGradients;

template <class T>
Mixture<T> mixture(const py::tuple& side, int64_t dim, bool with_variances = true) {
  check(side.size() == 8, "a side has 8 fields");
  const auto address = [&](int k) { return side[k].cast<Pointer>(); };
  const auto batch = side[4].cast<int64_t>(), n = side[5].cast<int64_t>();
  check_sizes({batch, n, dim});
  check(dim > 0 && dim <= cpu::kMaxDim, "dim must be positive and at most 2^22");
  const bool used = batch > 0 && n > 0;
  return {pointer<const T>(address(0), used),
          pointer<const T>(address(1), used && with_variances),
          pointer<const T>(address(2), false),
          nullptr,
          pointer<const int64_t>(address(3), false),
          batch,
          n,
          side[6].cast<bool>(),
          side[7].cast<bool>()};
}

template <class T>
Problem<T> make_problem(int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q, bool points = false) {
  const Problem<T> problem{batch, dim, mixture<T>(p, dim, !points), mixture<T>(q, dim)};
  check_sizes({batch, problem.p.n, problem.q.n});
  check(problem.q.n > 0, "q must have components");
  for (const auto* side : {&problem.p, &problem.q})
    check(batch == 0 || side->index || side->batch == batch || side->batch == 1, "an index is missing");
  return problem;
}

// A pair with its scale exponents: made where the lock is released, for the call.
template <class T>
struct Scaled {
  explicit Scaled(const Problem<T>& given) : problem(given) {}

  Problem<T> problem;
  cpu::ScaleExponents<T> p{problem.dim, problem.p}, q{problem.dim, problem.q};
  cpu::RowPrecisions<T> precisions{problem};
};

// (means, variances, log_weights)
template <class T>
SideGradients<T> side_gradients(const py::tuple& grads) {
  check(grads.size() == 3, "the gradients of a side have 3 fields");
  const auto address = [&](int k) { return grads[k].cast<Pointer>(); };
  return {pointer<T>(address(0), false), pointer<T>(address(1), false), pointer<T>(address(2), false)};
}

// Those of a forward pass: problems may not share the side.
template <class T>
SideGradients<T> own_gradients(const Mixture<T>& side, int64_t batch, const py::tuple& grads) {
  const SideGradients<T> gradients = side_gradients<T>(grads);
  check(!gradients.wanted() || (side.batch == batch && !side.index), "gradients of a side that problems share");
  return gradients;
}

bool cpu_overlap_lse_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                             Pointer rows, Pointer offsets, const py::tuple& grad_p, const py::tuple& grad_q,
                             int threads) {
  return with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    T* const out = pointer<T>(rows, problem.rows() > 0);
    double* const left_out = pointer<double>(offsets, batch > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::offsets(scaled.problem, cpu::Uniform::kOfQ, left_out);
    return cpu::overlap_lse_forward(scaled.problem, out, to_p, to_q, threads);
  });
}

void cpu_overlap_lse_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                              Pointer rows, Pointer grad_rows, const py::tuple& grad_p, const py::tuple& grad_q,
                              int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    const T* const values = pointer<const T>(rows, problem.rows() > 0);
    const T* const grads = pointer<const T>(grad_rows, problem.rows() > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::overlap_lse_backward(scaled.problem, grads, values, to_p, to_q, threads);
  });
}

bool cpu_log_overlap_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                             Pointer rows, Pointer values, Pointer offsets, const py::tuple& grad_p,
                             const py::tuple& grad_q, int threads) {
  return with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    T* const row_values = pointer<T>(rows, problem.rows() > 0);
    double* const out = pointer<double>(values, batch > 0);
    double* const left_out = pointer<double>(offsets, batch > 0);
    const SideGradients<T> to_p = own_gradients(problem.p, batch, grad_p);
    const SideGradients<T> to_q = own_gradients(problem.q, batch, grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::offsets(scaled.problem, cpu::Uniform::kOfBoth, left_out);
    return cpu::log_overlap_forward(scaled.problem, T(1), out, row_values, to_p, to_q, threads);
  });
}

void cpu_log_overlap_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                              Pointer rows, Pointer values, Pointer grad_values, const py::tuple& grad_p,
                              const py::tuple& grad_q, int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    const T* const saved = pointer<const T>(rows, problem.rows() > 0);
    const double* const totals = pointer<const double>(values, batch > 0);
    const T* const grads = pointer<const T>(grad_values, batch > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::log_overlap_backward(scaled.problem, T(1), grads, totals, saved, to_p, to_q, threads);
  });
}

bool cpu_self_overlap_forward(int itemsize, int64_t dim, const py::tuple& p, Pointer values, Pointer offsets,
                              const py::tuple& grad, int threads) {
  return with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    Mixture<T> side = mixture<T>(p, dim);
    double* const out = pointer<double>(values, side.batch > 0);
    double* const left_out = pointer<double>(offsets, side.batch > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad);
    const py::gil_scoped_release unlocked;
    const cpu::ScaleExponents<T> exponents(dim, side);
    cpu::offsets(Problem<T>{side.batch, dim, side, side}, cpu::Uniform::kOfBoth, left_out);
    return cpu::self_overlap_forward(dim, side, T(1), out, to_p, threads);
  });
}

void cpu_self_overlap_backward(int itemsize, int64_t dim, const py::tuple& p, Pointer values, Pointer grad_values,
                               const py::tuple& grad, int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    Mixture<T> side = mixture<T>(p, dim);
    const double* const saved = pointer<const double>(values, side.batch > 0);
    const T* const grads = pointer<const T>(grad_values, side.batch > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad);
    const py::gil_scoped_release unlocked;
    const cpu::ScaleExponents<T> exponents(dim, side);
    cpu::self_overlap_backward(dim, side, grads, saved, to_p, threads);
  });
}

bool cpu_cs_divergence_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                               Pointer divergence, Pointer rows, Pointer overlaps, const py::tuple& grad_p,
                               const py::tuple& grad_q, int threads) {
  return with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    T* const out = pointer<T>(divergence, batch > 0);
    T* const row_values = pointer<T>(rows, problem.rows() > 0);
    double* const terms = pointer<double>(overlaps, batch > 0);
    const SideGradients<T> to_p = own_gradients(problem.p, batch, grad_p);
    const SideGradients<T> to_q = own_gradients(problem.q, batch, grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    return cpu::cs_divergence_forward(scaled.problem, out, row_values, terms, to_p, to_q, threads);
  });
}

void cpu_cs_divergence_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                Pointer grad, Pointer rows, Pointer overlaps, const py::tuple& grad_p,
                                const py::tuple& grad_q, int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    const T* const grads = pointer<const T>(grad, batch > 0);
    const T* const row_values = pointer<const T>(rows, problem.rows() > 0);
    const double* const terms = pointer<const double>(overlaps, batch > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::cs_divergence_backward(scaled.problem, grads, row_values, terms, to_p, to_q, threads);
  });
}

void cpu_pairwise_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                          Pointer logits, int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    T* const out = pointer<T>(logits, problem.rows() > 0);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::pairwise_forward(scaled.problem, out, threads);
  });
}

void cpu_pairwise_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                           Pointer grad_logits, const py::tuple& grad_p, const py::tuple& grad_q, int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    const T* const grads = pointer<const T>(grad_logits, problem.rows() > 0);
    const SideGradients<T> to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::pairwise_backward(scaled.problem, grads, to_p, to_q, threads);
  });
}

void cpu_assign(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q, Pointer assignment,
                int threads) {
  with_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const Problem<T> problem = make_problem<T>(batch, dim, p, q);
    auto* const out = pointer<int64_t>(assignment, problem.rows() > 0);
    const py::gil_scoped_release unlocked;
    const Scaled<T> scaled(problem);
    cpu::assign(scaled.problem, out, threads);
  });
}

// The variances of both sides are covariances, see cpu.h; a p without them has points.
Problem<double> full_problem(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q) {
  check(itemsize == sizeof(double), "full covariances are computed in double");
  check(dim <= cpu::kMaxFullDim, "dim must be at most 32 for full covariances");
  const auto problem = make_problem<double>(batch, dim, p, q, true);
  for (const auto* side : {&problem.p, &problem.q}) check_sizes({side->batch, side->n, dim, dim});
  return problem;
}

void cpu_full_overlap_lse_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                  Pointer rows, int threads) {
  const Problem<double> problem = full_problem(itemsize, batch, dim, p, q);
  auto* const out = pointer<double>(rows, problem.rows() > 0);
  const py::gil_scoped_release unlocked;
  cpu::full_overlap_lse_forward(problem, out, threads);
}

void cpu_full_overlap_lse_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                   Pointer rows, Pointer grad_rows, const py::tuple& grad_p, const py::tuple& grad_q,
                                   int threads) {
  const Problem<double> problem = full_problem(itemsize, batch, dim, p, q);
  const auto* const values = pointer<const double>(rows, problem.rows() > 0);
  const auto* const grads = pointer<const double>(grad_rows, problem.rows() > 0);
  const auto to_p = side_gradients<double>(grad_p), to_q = side_gradients<double>(grad_q);
  check(problem.p.variances || !to_p.variances, "points have no gradients to variances");
  const py::gil_scoped_release unlocked;
  cpu::full_overlap_lse_backward(problem, grads, values, to_p, to_q, threads);
}

void cpu_full_self_overlap_forward(int itemsize, int64_t dim, const py::tuple& p, Pointer rows, int threads) {
  const Problem<double> problem = full_problem(itemsize, p[4].cast<int64_t>(), dim, p, p);
  auto* const out = pointer<double>(rows, problem.rows() > 0);
  const py::gil_scoped_release unlocked;
  cpu::full_self_overlap_forward(problem, out, threads);
}

void cpu_full_self_overlap_backward(int itemsize, int64_t dim, const py::tuple& p, Pointer rows, Pointer grad_rows,
                                    const py::tuple& grad, int threads) {
  const Problem<double> problem = full_problem(itemsize, p[4].cast<int64_t>(), dim, p, p);
  const auto* const values = pointer<const double>(rows, problem.rows() > 0);
  const auto* const grads = pointer<const double>(grad_rows, problem.rows() > 0);
  const auto to_p = side_gradients<double>(grad);
  const py::gil_scoped_release unlocked;
  cpu::full_self_overlap_backward(problem, grads, values, to_p, threads);
}

void cpu_full_pairwise_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                               Pointer logits, int threads) {
  const Problem<double> problem = full_problem(itemsize, batch, dim, p, q);
  auto* const out = pointer<double>(logits, problem.rows() > 0);
  const py::gil_scoped_release unlocked;
  cpu::full_pairwise_forward(problem, out, threads);
}

void cpu_full_pairwise_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                Pointer grad_logits, const py::tuple& grad_p, const py::tuple& grad_q, int threads) {
  const Problem<double> problem = full_problem(itemsize, batch, dim, p, q);
  const auto* const grads = pointer<const double>(grad_logits, problem.rows() > 0);
  const auto to_p = side_gradients<double>(grad_p), to_q = side_gradients<double>(grad_q);
  check(problem.p.variances || !to_p.variances, "points have no gradients to variances");
  const py::gil_scoped_release unlocked;
  cpu::full_pairwise_backward(problem, grads, to_p, to_q, threads);
}

void cpu_full_assign(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                     Pointer assignment, int threads) {
  const Problem<double> problem = full_problem(itemsize, batch, dim, p, q);
  auto* const out = pointer<int64_t>(assignment, problem.rows() > 0);
  const py::gil_scoped_release unlocked;
  cpu::full_assign(problem, out, threads);
}

}   // namespace
}   // namespace csdiv

PYBIND11_MODULE(_C, module) {
  using namespace csdiv;
  module.attr("version") = CSDIV_VERSION;
  module.attr("has_cuda") = CSDIV_HAS_CUDA;
  module.attr("cuda_status") = CSDIV_CUDA_STATUS;
  module.attr("compiler") = CSDIV_COMPILER;
  module.attr("build_type") = CSDIV_BUILD_TYPE;
  module.def("cpu_isas", &cpu::compiled_isas, "Instruction sets that were compiled in, widest last.");
  module.def("cpu_isa", &cpu::current_isa, "The instruction set in use.");
  module.def("cpu_share_openmp_threads", &cpu::share_openmp_threads, "Whether PyTorch's threads are used from now on.");
  module.def("cpu_set_isa", &cpu::set_isa, "For tests: uses another instruction set.");
  py::enum_<cpu::Arithmetic>(module, "Arithmetic", "What cpu_arithmetic consists of.")
      .value("MULTIPLY_ADDS", cpu::Arithmetic::kMultiplyAdds)
      .value("ADDITIONS", cpu::Arithmetic::kAdditions)
      .value("BOTH", cpu::Arithmetic::kBoth);
  module.def("cpu_arithmetic", &cpu::arithmetic, "For benchmarks: computes nothing of use, and how many numbers.",
             py::call_guard<py::gil_scoped_release>());
  module.def("cpu_overlap_lse_forward", &cpu_overlap_lse_forward);
  module.def("cpu_overlap_lse_backward", &cpu_overlap_lse_backward);
  module.def("cpu_log_overlap_forward", &cpu_log_overlap_forward);
  module.def("cpu_log_overlap_backward", &cpu_log_overlap_backward);
  module.def("cpu_self_overlap_forward", &cpu_self_overlap_forward);
  module.def("cpu_self_overlap_backward", &cpu_self_overlap_backward);
  module.def("cpu_cs_divergence_forward", &cpu_cs_divergence_forward);
  module.def("cpu_cs_divergence_backward", &cpu_cs_divergence_backward);
  module.def("cpu_pairwise_forward", &cpu_pairwise_forward);
  module.def("cpu_pairwise_backward", &cpu_pairwise_backward);
  module.def("cpu_assign", &cpu_assign);
  module.attr("cpu_max_full_dim") = cpu::kMaxFullDim;
  module.def("cpu_full_overlap_lse_forward", &cpu_full_overlap_lse_forward);
  module.def("cpu_full_overlap_lse_backward", &cpu_full_overlap_lse_backward);
  module.def("cpu_full_self_overlap_forward", &cpu_full_self_overlap_forward);
  module.def("cpu_full_self_overlap_backward", &cpu_full_self_overlap_backward);
  module.def("cpu_full_pairwise_forward", &cpu_full_pairwise_forward);
  module.def("cpu_full_pairwise_backward", &cpu_full_pairwise_backward);
  module.def("cpu_full_assign", &cpu_full_assign);
#ifdef CSDIV_WITH_CUDA
  bind_cuda(module);
#endif
}
