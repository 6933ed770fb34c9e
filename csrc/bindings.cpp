// The module csdiv._C: raw pointers, sizes and a number of threads; no torch. csdiv/backends/cpu.py calls the
// operators.
//
// Every operator takes (itemsize, batch, dim, arrays, sides, grads, threads), see csdiv/backends/arrays.py: `itemsize`
// is 4 (float) or 8 (double); `arrays` the addresses of the gradient of the value, in a backward pass, and of the
// outputs; `sides` those of p and q, each (means, variances, log_weights, index, batch, n, same_dims, same_components),
// see mixture.h, the same twice for a mixture with itself; `grads` those of the gradients to both sides, each (means,
// variances, log_weights). An address is 0 where an array is not given or not wanted.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <future>
#include <string>
#include <utility>

#include "arguments.h"
#include "cpu/cpu.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/scaled_gradients.h"
#include "cpu/sweep/pack.h"
#include "cpu/sweep/scale.h"
#include "cpu/system/memory.h"
#include "cpu/system/thread_pool.h"
#include "plain_call.h"
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

template <class T>
SideGradients<T> side_gradients(const py::tuple& grads) {
  check(grads.size() == 3, "the gradients of a side have 3 fields");
  const auto address = [&](int k) { return grads[k].cast<Pointer>(); };
  return {pointer<T>(address(0), false), pointer<T>(address(1), false), pointer<T>(address(2), false)};
}

// What Python hands over for one operator, checked.
template <class T>
struct Call {
  Problem<T> problem;
  Arrays arrays;
  SideGradients<T> grad_p, grad_q;
  int threads;

  // Array k.
  template <class U = T>
  U* at(int k) const {
    return arrays.at<U>(k);
  }

  // Gradients of a forward pass: problems may not share a side that has any.
  void check_own_gradients() const {
    const auto own = [&](const Mixture<T>& side, const SideGradients<T>& grads) {
      return !grads.wanted() || (side.batch == problem.batch && !side.index);
    };
    check(own(problem.p, grad_p) && own(problem.q, grad_q), "gradients of a side that problems share");
  }
};

template <class T>
Call<T> make_call(int64_t batch, int64_t dim, const Kinds& kinds, const py::tuple& arrays, const py::tuple& sides,
                  const py::tuple& grads, int threads, bool points = false) {
  const auto problem = make_problem<T>(batch, dim, one_of_two(sides, 0), one_of_two(sides, 1), points);
  return {problem, Arrays(arrays, kinds, problem.rows() > 0, batch > 0), side_gradients<T>(one_of_two(grads, 0)),
          side_gradients<T>(one_of_two(grads, 1)), threads};
}

// The scale exponents of a pair, or of a mixture with itself, for the time of a call.
template <class T>
struct PairScale {
  PairScale(Problem<T>& problem, int threads)
      : p(problem.dim, problem.p, threads), q(problem.dim, problem.q, threads), precisions(problem) {}

  cpu::ScaleExponents<T> p, q;
  cpu::RowPrecisions<T> precisions;
};
template <class T>
struct SelfScale {
  SelfScale(Problem<T>& problem, int threads) : p(problem.dim, problem.p, threads) { problem.q = problem.p; }

  cpu::ScaleExponents<T> p;
};

// The driver makes its own.
template <class T>
struct NoScale {
  NoScale(const Problem<T>&, int) {}
};

// Runs the handlers of signals that have come, as Python does between two instructions; true if one of them raised.
bool handler_raised() {
  const py::gil_scoped_acquire locked;
  return PyErr_CheckSignals() != 0;
}

bool on_main_thread() {              // where Python runs signal handlers
  thread_local bool known = false;   // it stays the main thread; another may become it in a forked child
  if (known) return true;
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> main_thread;
  const auto find = [] { return py::object(py::module_::import("threading").attr("main_thread")); };
  return known = main_thread.call_once_and_store_result(find).get_stored()().attr("ident").cast<unsigned long>() ==
                 PyThread_get_thread_ident();
}

// run() without Python's lock; signals end it.
template <class F>
auto interruptible(const F& run) {
  const bool signals = on_main_thread();
  const py::gil_scoped_release unlocked;
  // A handler that calls csdiv itself: the call that it came in between has this thread's memory.
  if (cpu::Interruptible::asking()) return std::async(std::launch::async, run).get();
  const cpu::Interruptible scope(signals ? &handler_raised : nullptr);
  return run();
}

// run(call), without Python's lock.
template <template <class> class Scale, class F>
void define(py::module_& module, const char* name, const Kinds& kinds, const F& run) {
  module.def(name, [kinds, run](int itemsize, int64_t batch, int64_t dim, const py::tuple& arrays,
                                const py::tuple& sides, const py::tuple& grads, int threads) {
    return with_type(itemsize, [&](auto type) {
      using T = decltype(type);
      Call<T> call = make_call<T>(batch, dim, kinds, arrays, sides, grads, threads);
      return interruptible([&] {
        const Scale<T> scale(call.problem, call.threads);
        return run(std::as_const(call));
      });
    });
  });
}

// The variances of both sides are covariances, see cpu.h; a p without them has points. With `factors` it has, and those
// of q are lower triangular factors.
template <class F>
void define_full(py::module_& module, const char* name, const Kinds& kinds, const F& run, bool factors = false) {
  module.def(name, [kinds, run, factors](int itemsize, int64_t batch, int64_t dim, const py::tuple& arrays,
                                         const py::tuple& sides, const py::tuple& grads, int threads) {
    check(itemsize == sizeof(double), "full covariances are computed in double");
    check(dim <= cpu::kMaxFullDim, "dim must be at most 32 for full covariances");
    auto call = make_call<double>(batch, dim, kinds, arrays, sides, grads, threads, true);
    call.problem.q_factors = factors;
    check(!factors || !call.problem.p.variances, "factors need points");
    for (const auto* side : {&call.problem.p, &call.problem.q}) check_sizes({side->batch, side->n, dim, dim});
    check(call.problem.p.variances || !call.grad_p.variances, "points have no gradients to variances");
    interruptible([&] { run(std::as_const(call)); });
  });
}

void define_scaled(py::module_& module) {
  module.def("cpu_scaled", [](const py::tuple& upstream, const py::tuple& gradients, int threads) {
    check(upstream.size() == 4, "an upstream gradient has 4 fields");
    const auto count = upstream[1].cast<int64_t>();
    const cpu::Upstream factors{pointer<const void>(upstream[0].cast<Pointer>(), count > 0), count,
                                upstream[2].cast<int>() == sizeof(double), upstream[3].cast<bool>()};
    std::vector<cpu::ScaledArray> arrays;
    for (const auto& item : gradients) {
      const auto array = item.cast<py::tuple>();
      check(array.size() == 4, "a gradient has 4 fields");
      const auto size = array[2].cast<int64_t>();
      check(count > 0 || factors.one_factor || size == 0, "gradients of no value");
      arrays.push_back({pointer<const void>(array[0].cast<Pointer>(), size > 0),
                        pointer<void>(array[1].cast<Pointer>(), size > 0), size,
                        array[3].cast<int>() == sizeof(double)});
    }
    return interruptible([&] { return cpu::scaled_gradients(factors, arrays, threads); });
  });
}

void define_operators(py::module_& module) {
  define<PairScale>(module, "cpu_overlap_lse_forward", {Per::kRow, Per::kProblem}, [](const auto& call) {
    cpu::offsets(call.problem, cpu::Uniform::kOfQ, call.template at<double>(1));
    return cpu::overlap_lse_forward(call.problem, call.at(0), call.grad_p, call.grad_q, call.threads);
  });
  define<PairScale>(module, "cpu_overlap_lse_backward", {Per::kRow, Per::kRow, Per::kProblem}, [](const auto& call) {
    cpu::overlap_lse_backward(call.problem, call.at(0), call.at(1), call.grad_p, call.grad_q, call.threads);
  });
  define<PairScale>(module, "cpu_log_overlap_forward", {Per::kProblem, Per::kProblem, Per::kRow}, [](const auto& call) {
    call.check_own_gradients();
    cpu::offsets(call.problem, cpu::Uniform::kOfBoth, call.template at<double>(1));
    return cpu::log_overlap_forward(call.problem, {1}, call.template at<double>(0), call.at(2), call.grad_p,
                                    call.grad_q, call.threads);
  });
  define<PairScale>(module, "cpu_log_overlap_backward", {Per::kProblem, Per::kProblem, Per::kRow},
                    [](const auto& call) {
                      cpu::log_overlap_backward(call.problem, {1}, call.at(0), call.template at<double>(1), call.at(2),
                                                call.grad_p, call.grad_q, call.threads);
                    });
  define<SelfScale>(module, "cpu_self_overlap_forward", {Per::kProblem, Per::kProblem}, [](const auto& call) {
    cpu::offsets(call.problem, cpu::Uniform::kOfBoth, call.template at<double>(1));
    return cpu::self_overlap_forward(call.problem.dim, call.problem.p, {1}, call.template at<double>(0), call.grad_p,
                                     call.threads);
  });
  define<SelfScale>(module, "cpu_self_overlap_backward", {Per::kProblem, Per::kProblem}, [](const auto& call) {
    cpu::self_overlap_backward(call.problem.dim, call.problem.p, call.at(0), call.template at<double>(1), call.grad_p,
                               call.threads);
  });
  define<PairScale>(
      module, "cpu_cs_divergence_forward", {Per::kProblem, Per::kRow, Per::kProblem}, [](const auto& call) {
        call.check_own_gradients();
        return cpu::cs_divergence_forward(call.problem, call.at(0), call.at(1), call.template at<double>(2),
                                          call.grad_p, call.grad_q, call.threads);
      });
  define<PairScale>(module, "cpu_cs_divergence_backward", {Per::kProblem, Per::kRow, Per::kProblem},
                    [](const auto& call) {
                      cpu::cs_divergence_backward(call.problem, call.at(0), call.at(1), call.template at<double>(2),
                                                  call.grad_p, call.grad_q, call.threads);
                    });
  for (const bool logarithms : {false, true}) {
    const std::string prefix = logarithms ? "cpu_regularizer_" : "cpu_component_divergence_";
    const Kinds kinds{Per::kRow, Per::kRow, Per::kProblem, Per::kOptional, Per::kOptional};
    define<NoScale>(module, (prefix + "forward").c_str(), kinds, [logarithms](const auto& call) {
      cpu::component_divergence_forward(call.problem, logarithms, call.template at<const double>(3), call.at(0),
                                        call.at(1), call.template at<double>(2), call.grad_p, call.grad_q,
                                        call.template at<double>(4), call.threads);
    });
    define<NoScale>(module, (prefix + "backward").c_str(), kinds, [logarithms](const auto& call) {
      cpu::component_divergence_backward(call.problem, logarithms, call.template at<const double>(3), call.at(0),
                                         call.at(1), call.template at<double>(2), call.grad_p, call.grad_q,
                                         call.template at<double>(4), call.threads);
    });
  }
  define<PairScale>(module, "cpu_pairwise_forward", {Per::kRow},
                    [](const auto& call) { cpu::pairwise_forward(call.problem, call.at(0), call.threads); });
  define<PairScale>(module, "cpu_pairwise_backward", {Per::kRow}, [](const auto& call) {
    cpu::pairwise_backward(call.problem, call.at(0), call.grad_p, call.grad_q, call.threads);
  });
  define<PairScale>(module, "cpu_assign", {Per::kRow},
                    [](const auto& call) { cpu::assign(call.problem, call.template at<int64_t>(0), call.threads); });

  for (const bool factors : {false, true}) {
    const std::string prefix = factors ? "cpu_factored_" : "cpu_full_";
    const auto define = [&](const char* name, const Kinds& kinds, const auto& run) {
      define_full(module, (prefix + name).c_str(), kinds, run, factors);
    };
    define("overlap_lse_forward", {Per::kRow},
           [](const Call<double>& call) { cpu::full_overlap_lse_forward(call.problem, call.at(0), call.threads); });
    define("overlap_lse_backward", {Per::kRow, Per::kRow}, [](const Call<double>& call) {
      cpu::full_overlap_lse_backward(call.problem, call.at(0), call.at(1), call.grad_p, call.grad_q, call.threads);
    });
    define("pairwise_forward", {Per::kRow},
           [](const Call<double>& call) { cpu::full_pairwise_forward(call.problem, call.at(0), call.threads); });
    define("pairwise_backward", {Per::kRow}, [](const Call<double>& call) {
      cpu::full_pairwise_backward(call.problem, call.at(0), call.grad_p, call.grad_q, call.threads);
    });
    define("assign", {Per::kRow},
           [](const Call<double>& call) { cpu::full_assign(call.problem, call.at<int64_t>(0), call.threads); });
  }
  define_full(module, "cpu_full_self_overlap_forward", {Per::kRow},
              [](const Call<double>& call) { cpu::full_self_overlap_forward(call.problem, call.at(0), call.threads); });
  define_full(module, "cpu_full_self_overlap_backward", {Per::kRow, Per::kRow}, [](const Call<double>& call) {
    cpu::full_self_overlap_backward(call.problem, call.at(0), call.at(1), call.grad_p, call.threads);
  });
}

}   // namespace
}   // namespace csdiv

PYBIND11_MODULE(_C, module) {
  using namespace csdiv;
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const cpu::Interrupted&) {   // Python has the handler's exception already
    }
  });
  module.attr("version") = CSDIV_VERSION;
  module.attr("has_cuda") = CSDIV_HAS_CUDA;
  module.attr("cuda_status") = CSDIV_CUDA_STATUS;
  module.attr("compiler") = CSDIV_COMPILER;
  module.attr("build_type") = CSDIV_BUILD_TYPE;
  module.def("cpu_isas", &cpu::compiled_isas, "Instruction sets that were compiled in, widest last.");
  module.def("cpu_isa", &cpu::current_isa, "The instruction set in use.");
  module.def("cpu_share_openmp_threads", &cpu::share_openmp_threads, "Whether PyTorch's threads are used from now on.");
  module.def("cpu_empty_cache", &cpu::empty_cache, "Gives back the memory that is kept between calls.");
  module.def(
      "cpu_ask_for_huge_pages",
      [](Pointer address, int64_t bytes) { cpu::ask_for_huge_pages(pointer<void>(address), bytes); },
      "Of memory that was not written yet.");
  module.def("cpu_set_isa", &cpu::set_isa, "For tests: uses another instruction set.");
  py::enum_<cpu::Arithmetic>(module, "Arithmetic", "What cpu_arithmetic consists of.", py::module_local())
      .value("MULTIPLY_ADDS", cpu::Arithmetic::kMultiplyAdds)
      .value("ADDITIONS", cpu::Arithmetic::kAdditions)
      .value("BOTH", cpu::Arithmetic::kBoth);
  module.def("cpu_arithmetic", &cpu::arithmetic, "For benchmarks: computes nothing of use, and how many numbers.",
             py::call_guard<py::gil_scoped_release>());
  module.attr("cpu_max_full_dim") = cpu::kMaxFullDim;
  define_operators(module);
  define_scaled(module);
  module.def("plain_call", &plain_call, "Arguments, outputs and gradients of a call with plain tensors, else None.");
#ifdef CSDIV_WITH_CUDA
  bind_cuda(module);
#endif
}
