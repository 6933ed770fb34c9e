// Raw pointers to device memory, sizes and a stream; no torch. csdiv/backends/cuda.py is the only caller.
//
// Every operator takes (itemsize, batch, dim, arrays, sides, grads, context), as in csrc/bindings.cpp but for the last:
// (device, stream, multiprocessors, scratch). Without scratch memory, 0, a function launches nothing; it returns how
// many bytes it wants.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "../arguments.h"
#include "cuda.h"
#include "pack.h"
#include "partition.h"

namespace csdiv {
namespace {

using cuda::Context;
using cuda::Mixture;
using cuda::Problem;
using cuda::SideGradients;

// The device of a call, for its duration. To set a device creates a context there, so none is set but to change it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cuda::check(cudaGetDevice(&previous_));
    if (device_ != previous_) cuda::check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }

 private:
  int device_, previous_ = 0;
};

template <class T>
Mixture<T> mixture(const py::tuple& fields, int64_t dim) {
  check(fields.size() == 8, "a side has 8 fields");
  const auto address = [&](int k) { return fields[k].cast<Pointer>(); };
  const auto items = fields[4].cast<int64_t>(), n = fields[5].cast<int64_t>();
  check_sizes({items, n + cuda::kTile, dim + cuda::kGroup, 2});
  check(dim > 0 && dim < INT32_MAX, "dim must be positive, and an int");
  const bool used = items > 0 && n > 0;
  return {pointer<const T>(address(0), used),
          pointer<const T>(address(1), used),
          pointer<const T>(address(2), false),
          pointer<const int64_t>(address(3), false),
          items,
          n,
          nullptr,
          nullptr,
          nullptr,
          0,
          fields[6].cast<bool>()};
}

template <class T>
SideGradients<T> side_gradients(const py::tuple& fields) {
  check(fields.size() == 3, "the gradients of a side have 3 fields");
  const auto address = [&](int k) { return pointer<T>(fields[k].cast<Pointer>(), false); };
  return {address(0), address(1), address(2)};
}

// What Python hands over for one operator, checked.
template <class T>
struct Call {
  Problem<T> problem;
  Arrays arrays;
  SideGradients<T> grad_p, grad_q;

  // Array k.
  template <class U = T>
  U* at(int k) const {
    return arrays.at<U>(k);
  }
};

template <class T>
Call<T> make_call(int64_t batch, int64_t dim, const Kinds& kinds, const py::tuple& arrays, const py::tuple& sides,
                  const py::tuple& grads) {
  const Problem<T> problem{
      batch, dim, mixture<T>(one_of_two(sides, 0), dim), mixture<T>(one_of_two(sides, 1), dim), {}};
  check_sizes({batch, problem.p.n, problem.q.n});
  for (const int64_t size : {batch, problem.p.tiles(), problem.q.tiles() * 2})
    check(size < INT32_MAX, "more components or problems than blocks count");
  check(problem.q.n > 0, "q must have components");
  for (const auto* side : {&problem.p, &problem.q})
    check(batch == 0 || side->index || side->items == batch || side->items == 1, "an index is missing");
  return {problem, Arrays(arrays, kinds, batch > 0 && problem.p.n > 0, batch > 0),
          side_gradients<T>(one_of_two(grads, 0)), side_gradients<T>(one_of_two(grads, 1))};
}

// run(context, call) without Python's lock; how much scratch memory that takes.
template <class T, class F>
int64_t run_in(const py::tuple& context, const Call<T>& call, const F& run) {
  check(context.size() == 4, "a context has 4 fields");
  const int device = context[0].cast<int>();
  Context where{reinterpret_cast<cudaStream_t>(context[1].cast<Pointer>()), context[2].cast<int>(), device,
                reinterpret_cast<char*>(context[3].cast<Pointer>())};
  const py::gil_scoped_release unlocked;
  if (where.scratch) {
    const DeviceGuard guard(device);
    run(where, call);
  } else {
    run(where, call);
  }
  return where.used;
}

template <class F>
void define(py::module_& module, const char* name, const Kinds& kinds, const F& run) {
  module.def(name, [kinds, run](int itemsize, int64_t batch, int64_t dim, const py::tuple& arrays,
                                const py::tuple& sides, const py::tuple& grads, const py::tuple& context) {
    return with_type(itemsize, [&](auto type) {
      return run_in(context, make_call<decltype(type)>(batch, dim, kinds, arrays, sides, grads), run);
    });
  });
}

// The same for sides that have covariances, see cuda.h.
template <class F>
void define_full(py::module_& module, const char* name, const Kinds& kinds, const F& run) {
  module.def(name, [kinds, run](int itemsize, int64_t batch, int64_t dim, const py::tuple& arrays,
                                const py::tuple& sides, const py::tuple& grads, const py::tuple& context) {
    check(itemsize == sizeof(double), "full covariances are computed in double");
    check(dim <= cuda::kMaxFullDim, "dim must be at most 32 for full covariances");
    const auto call = make_call<double>(batch, dim, kinds, arrays, sides, grads);
    for (const auto* side : {&call.problem.p, &call.problem.q}) {
      check_sizes({side->items, side->n, dim, dim});
      check(batch * side->n < INT32_MAX, "more components than parts count");
    }
    return run_in(context, call, run);
  });
}

void define_operators(py::module_& module) {
  define(module, "cuda_overlap_lse_forward", {Per::kRow, Per::kProblem}, [](Context& where, const auto& call) {
    cuda::overlap_lse_forward(where, call.problem, call.at(0), call.template at<double>(1));
  });
  define(module, "cuda_overlap_lse_backward", {Per::kRow, Per::kRow}, [](Context& where, const auto& call) {
    cuda::overlap_lse_backward(where, call.problem, call.at(0), call.template at<double>(1), call.grad_p, call.grad_q);
  });
  define(module, "cuda_log_overlap_forward", {Per::kProblem, Per::kProblem, Per::kRow},
         [](Context& where, const auto& call) {   // whose offset is zero
           cuda::log_overlap_forward(where, call.problem, call.template at<double>(0), call.at(2), call.grad_p,
                                     call.grad_q);
         });
  define(module, "cuda_log_overlap_backward", {Per::kProblem, Per::kProblem, Per::kRow},
         [](Context& where, const auto& call) {
           cuda::log_overlap_backward(where, call.problem, call.at(0), call.template at<double>(1), call.grad_p,
                                      call.grad_q);
         });
  define(module, "cuda_self_overlap_forward", {Per::kProblem, Per::kProblem}, [](Context& where, const auto& call) {
    cuda::self_overlap_forward(where, call.problem, call.template at<double>(0), call.grad_p);
  });
  define(module, "cuda_self_overlap_backward", {Per::kProblem, Per::kProblem}, [](Context& where, const auto& call) {
    cuda::self_overlap_backward(where, call.problem, call.at(0), call.template at<double>(1), call.grad_p);
  });
  define(module, "cuda_cs_divergence_forward", {Per::kProblem, Per::kRow, Per::kProblem},
         [](Context& where, const auto& call) {
           cuda::cs_divergence_forward(where, call.problem, call.at(0), call.at(1), call.template at<double>(2),
                                       call.grad_p, call.grad_q);
         });
  define(module, "cuda_cs_divergence_backward", {Per::kProblem, Per::kRow, Per::kProblem},
         [](Context& where, const auto& call) {
           cuda::cs_divergence_backward(where, call.problem, call.at(0), call.template at<double>(2), call.grad_p,
                                        call.grad_q);
         });
  for (const bool logarithms : {false, true}) {
    const std::string prefix = logarithms ? "cuda_regularizer_" : "cuda_component_divergence_";
    const Kinds kinds{Per::kRow, Per::kRow, Per::kProblem, Per::kOptional, Per::kOptional};
    define(module, (prefix + "forward").c_str(), kinds, [logarithms](Context& where, const auto& call) {
      cuda::component_divergence_forward(where, call.problem, logarithms, call.template at<const double>(3), call.at(0),
                                         call.at(1), call.template at<double>(2));
    });
    define(module, (prefix + "backward").c_str(), kinds, [logarithms](Context& where, const auto& call) {
      cuda::component_divergence_backward(where, call.problem, logarithms, call.template at<const double>(3),
                                          call.at(0), call.at(1), call.template at<double>(2), call.grad_p, call.grad_q,
                                          call.template at<double>(4));
    });
  }
  define(module, "cuda_pairwise_forward", {Per::kRow},
         [](Context& where, const auto& call) { cuda::pairwise_forward(where, call.problem, call.at(0)); });
  define(module, "cuda_pairwise_backward", {Per::kRow}, [](Context& where, const auto& call) {
    cuda::pairwise_backward(where, call.problem, call.at(0), call.grad_p, call.grad_q);
  });
  define(module, "cuda_assign", {Per::kRow},
         [](Context& where, const auto& call) { cuda::assign(where, call.problem, call.template at<int64_t>(0)); });

  define_full(module, "cuda_full_overlap_lse_forward", {Per::kRow}, [](Context& where, const Call<double>& call) {
    cuda::full_overlap_lse_forward(where, call.problem, false, call.at(0));
  });
  define_full(module, "cuda_full_overlap_lse_backward", {Per::kRow, Per::kRow},
              [](Context& where, const Call<double>& call) {
                cuda::full_overlap_lse_backward(where, call.problem, call.at(0), call.at(1), call.grad_p, call.grad_q);
              });
  define_full(module, "cuda_full_self_overlap_forward", {Per::kRow}, [](Context& where, const Call<double>& call) {
    cuda::full_overlap_lse_forward(where, call.problem, true, call.at(0));
  });
  define_full(module, "cuda_full_self_overlap_backward", {Per::kRow, Per::kRow},
              [](Context& where, const Call<double>& call) {
                cuda::full_overlap_lse_backward(where, call.problem, call.at(0), call.at(1), call.grad_p, {});
              });
  define_full(module, "cuda_full_pairwise_forward", {Per::kRow}, [](Context& where, const Call<double>& call) {
    cuda::full_pairwise_forward(where, call.problem, call.at(0));
  });
  define_full(module, "cuda_full_pairwise_backward", {Per::kRow}, [](Context& where, const Call<double>& call) {
    cuda::full_pairwise_backward(where, call.problem, call.at(0), call.grad_p, call.grad_q);
  });
  define_full(module, "cuda_full_assign", {Per::kRow}, [](Context& where, const Call<double>& call) {
    cuda::full_assign(where, call.problem, call.at<int64_t>(0));
  });
}

// How the gradients of one to three sums over pairs, (batch, n, m, whether of a mixture with itself), are cut for so
// many multiprocessors: (ranges of rows, of columns, phases) of each, see partition.h.
std::vector<std::tuple<int, int, int>> partitions(int itemsize, int64_t dim,
                                                  const std::vector<std::tuple<int64_t, int64_t, int64_t, bool>>& sums,
                                                  int processors) {
  check(sums.size() >= 1 && sums.size() <= 3, "one to three sums");
  cuda::SweepSize sizes[3];
  cuda::Partition found[3];
  for (size_t k = 0; k < sums.size(); ++k)
    sizes[k] = {std::get<0>(sums[k]), std::get<1>(sums[k]), std::get<2>(sums[k]), std::get<3>(sums[k])};
  with_type(itemsize, [&](auto type) {
    cuda::choose_partitions<decltype(type)>(sizes, int(sums.size()), dim, processors, found);
  });
  std::vector<std::tuple<int, int, int>> result;
  for (size_t k = 0; k < sums.size(); ++k)
    result.emplace_back(found[k].row_ranges, found[k].column_ranges, found[k].phases);
  return result;
}

// Versions as 1000 major + 10 minor; a driver of 0 is none.
py::tuple versions() {
  int runtime = 0, driver = 0;
  cuda::check(cudaRuntimeGetVersion(&runtime));
  cuda::check(cudaDriverGetVersion(&driver));
  return py::make_tuple(runtime, driver);
}

// Whether `device` has code of the kernels, which loads them; else why not.
std::string kernels_status(int device) {
  const DeviceGuard guard(device);
  const cudaError_t error = cuda::load_kernels();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}   // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_versions", &versions, "Of the runtime built in and of the driver.");
  module.def("cuda_kernels_status", &kernels_status, "Loads the kernels on a device; why that fails, or nothing.");
  module.def("cuda_partitions", &partitions, "How the gradient sweep is cut.");
  module.attr("cuda_max_full_dim") = cuda::kMaxFullDim;
  define_operators(module);
}

}   // namespace csdiv
