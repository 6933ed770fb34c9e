// Raw pointers to device memory, sizes and a stream; no torch. csdiv/backends/cuda.py is the only caller.
//
// A side is the tuple (means, variances, log_weights, index, items, n), see mixture.h, and two more fields that are not
// used here; the gradients of a side (means, variances, log_weights); pointers are integers, 0 where an array is not
// given. `itemsize` is 4 (float) or 8 (double). The context is (device, stream, multiprocessors, scratch): without
// scratch memory, 0, a function launches nothing and returns how many bytes it wants.
#include "bindings.h"

#include "../arguments.h"
#include "cuda.h"
#include "pack.h"

namespace csdiv {
namespace {

using cuda::Context;
using cuda::Mixture;
using cuda::Problem;
using cuda::SideGradients;

// The device of a call, for its duration.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda::check(cudaGetDevice(&previous_));
    if (device != previous_) cuda::check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

template <class T>
Mixture<T> side(const py::tuple& fields, int64_t dim) {
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
          nullptr};
}

template <class T>
SideGradients<T> side_gradients(const py::tuple& fields) {
  check(fields.size() == 3, "the gradients of a side have 3 fields");
  const auto address = [&](int k) { return pointer<T>(fields[k].cast<Pointer>(), false); };
  return {address(0), address(1), address(2)};
}

template <class T>
T number_of(const Problem<T>&);
template <class P>
using Number = decltype(number_of(std::declval<P>()));

// f(problem) takes what it needs of Python objects and returns what is to be done with a context, where the lock is
// released. Returns how much scratch memory that takes.
template <class T, class F>
int64_t call(int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q, const py::tuple& context, const F& f) {
  const Problem<T> problem{batch, dim, side<T>(p, dim), side<T>(q, dim), {}};
  check_sizes({batch, problem.p.n, problem.q.n});
  for (const int64_t size : {batch, problem.p.tiles(), problem.q.tiles() * 2})
    check(size < INT32_MAX, "more components or problems than blocks count");
  check(problem.q.n > 0, "q must have components");
  for (const auto* s : {&problem.p, &problem.q})
    check(batch == 0 || s->index || s->items == batch || s->items == 1, "an index is missing");
  check(context.size() == 4, "a context has 4 fields");
  const int device = context[0].cast<int>();
  Context where{reinterpret_cast<cudaStream_t>(context[1].cast<Pointer>()), context[2].cast<int>(),
                reinterpret_cast<char*>(context[3].cast<Pointer>())};
  const auto run = f(problem);
  const py::gil_scoped_release unlocked;
  if (where.scratch) {
    const DeviceGuard guard(device);
    run(where);
  } else {
    run(where);
  }
  return where.used;
}

template <class F>
int64_t call(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q, const py::tuple& context,
             const F& f) {
  return with_type(itemsize, [&](auto type) { return call<decltype(type)>(batch, dim, p, q, context, f); });
}

template <class T>
bool has_rows(const Problem<T>& problem) {
  return problem.batch > 0 && problem.p.n > 0;
}

int64_t overlap_lse_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                            Pointer rows, Pointer offsets, const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    T* const out = pointer<T>(rows, has_rows(problem));
    double* const left_out = pointer<double>(offsets, batch > 0);
    return [=](Context& where) { cuda::overlap_lse_forward(where, problem, out, left_out); };
  });
}

int64_t overlap_lse_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                             Pointer rows, Pointer grad_rows, const py::tuple& grad_p, const py::tuple& grad_q,
                             const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    const double* const values = pointer<const double>(rows, has_rows(problem));
    const T* const grads = pointer<const T>(grad_rows, has_rows(problem));
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::overlap_lse_backward(where, problem, grads, values, to_p, to_q); };
  });
}

int64_t log_overlap_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                            Pointer rows, Pointer values, const py::tuple& grad_p, const py::tuple& grad_q,
                            const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    T* const row_values = pointer<T>(rows, has_rows(problem));
    double* const out = pointer<double>(values, batch > 0);
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::log_overlap_forward(where, problem, out, row_values, to_p, to_q); };
  });
}

int64_t log_overlap_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                             Pointer values, Pointer grad_values, const py::tuple& grad_p, const py::tuple& grad_q,
                             const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    const T* const grads = pointer<const T>(grad_values, batch > 0);
    const double* const saved = pointer<const double>(values, batch > 0);
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::log_overlap_backward(where, problem, grads, saved, to_p, to_q); };
  });
}

int64_t self_overlap_forward(int itemsize, int64_t dim, const py::tuple& p, Pointer values, const py::tuple& grad,
                             const py::tuple& context) {
  return call(itemsize, p[4].cast<int64_t>(), dim, p, p, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    double* const out = pointer<double>(values, problem.batch > 0);
    const auto to_p = side_gradients<T>(grad);
    return [=](Context& where) { cuda::self_overlap_forward(where, problem, out, to_p); };
  });
}

int64_t self_overlap_backward(int itemsize, int64_t dim, const py::tuple& p, Pointer values, Pointer grad_values,
                              const py::tuple& grad, const py::tuple& context) {
  return call(itemsize, p[4].cast<int64_t>(), dim, p, p, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    const T* const grads = pointer<const T>(grad_values, problem.batch > 0);
    const double* const saved = pointer<const double>(values, problem.batch > 0);
    const auto to_p = side_gradients<T>(grad);
    return [=](Context& where) { cuda::self_overlap_backward(where, problem, grads, saved, to_p); };
  });
}

int64_t cs_divergence_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                              Pointer divergences, Pointer rows, Pointer overlaps, const py::tuple& grad_p,
                              const py::tuple& grad_q, const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    T* const out = pointer<T>(divergences, batch > 0);
    T* const row_values = pointer<T>(rows, has_rows(problem));
    double* const terms = pointer<double>(overlaps, batch > 0);
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::cs_divergence_forward(where, problem, out, row_values, terms, to_p, to_q); };
  });
}

int64_t cs_divergence_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                               Pointer grad, Pointer overlaps, const py::tuple& grad_p, const py::tuple& grad_q,
                               const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    const T* const grads = pointer<const T>(grad, batch > 0);
    const double* const terms = pointer<const double>(overlaps, batch > 0);
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::cs_divergence_backward(where, problem, grads, terms, to_p, to_q); };
  });
}

int64_t pairwise_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                         Pointer densities, const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    T* const out = pointer<T>(densities, has_rows(problem));
    return [=](Context& where) { cuda::pairwise_forward(where, problem, out); };
  });
}

int64_t pairwise_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                          Pointer grad_densities, const py::tuple& grad_p, const py::tuple& grad_q,
                          const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    using T = Number<decltype(problem)>;
    const T* const grads = pointer<const T>(grad_densities, has_rows(problem));
    const auto to_p = side_gradients<T>(grad_p), to_q = side_gradients<T>(grad_q);
    return [=](Context& where) { cuda::pairwise_backward(where, problem, grads, to_p, to_q); };
  });
}

int64_t assign(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q, Pointer assignment,
               const py::tuple& context) {
  return call(itemsize, batch, dim, p, q, context, [&](const auto& problem) {
    auto* const out = pointer<int64_t>(assignment, has_rows(problem));
    return [=](Context& where) { cuda::assign(where, problem, out); };
  });
}

// f as above, on sides that have covariances, see cuda.h.
template <class F>
int64_t call_full(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                  const py::tuple& context, const F& f) {
  check(itemsize == sizeof(double), "full covariances are computed in double");
  check(dim <= cuda::kMaxFullDim, "dim must be at most 32 for full covariances");
  return call<double>(batch, dim, p, q, context, [&](const Problem<double>& problem) {
    check_sizes({problem.p.items, problem.p.n, dim, dim});
    check_sizes({problem.q.items, problem.q.n, dim, dim});
    for (const int64_t size : {problem.p.n, problem.q.n})
      check(batch * size < INT32_MAX, "more components than parts count");
    return f(problem);
  });
}

int64_t full_overlap_lse_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                 bool self, Pointer rows, const py::tuple& context) {
  return call_full(itemsize, batch, dim, p, q, context, [&](const Problem<double>& problem) {
    auto* const out = pointer<double>(rows, has_rows(problem));
    return [=](Context& where) { cuda::full_overlap_lse_forward(where, problem, self, out); };
  });
}

int64_t full_overlap_lse_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                                  Pointer rows, Pointer grad_rows, const py::tuple& grad_p, const py::tuple& grad_q,
                                  const py::tuple& context) {
  return call_full(itemsize, batch, dim, p, q, context, [&](const Problem<double>& problem) {
    const auto* const values = pointer<const double>(rows, has_rows(problem));
    const auto* const grads = pointer<const double>(grad_rows, has_rows(problem));
    const auto to_p = side_gradients<double>(grad_p), to_q = side_gradients<double>(grad_q);
    return [=](Context& where) { cuda::full_overlap_lse_backward(where, problem, grads, values, to_p, to_q); };
  });
}

int64_t full_pairwise_forward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                              Pointer densities, const py::tuple& context) {
  return call_full(itemsize, batch, dim, p, q, context, [&](const Problem<double>& problem) {
    auto* const out = pointer<double>(densities, has_rows(problem));
    return [=](Context& where) { cuda::full_pairwise_forward(where, problem, out); };
  });
}

int64_t full_pairwise_backward(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                               Pointer grad_densities, const py::tuple& grad_p, const py::tuple& grad_q,
                               const py::tuple& context) {
  return call_full(itemsize, batch, dim, p, q, context, [&](const Problem<double>& problem) {
    const auto* const grads = pointer<const double>(grad_densities, has_rows(problem));
    const auto to_p = side_gradients<double>(grad_p), to_q = side_gradients<double>(grad_q);
    return [=](Context& where) { cuda::full_pairwise_backward(where, problem, grads, to_p, to_q); };
  });
}

int64_t full_assign(int itemsize, int64_t batch, int64_t dim, const py::tuple& p, const py::tuple& q,
                    Pointer assignment, const py::tuple& context) {
  return call_full(itemsize, batch, dim, p, q, context, [&](const Problem<double>& problem) {
    auto* const out = pointer<int64_t>(assignment, has_rows(problem));
    return [=](Context& where) { cuda::full_assign(where, problem, out); };
  });
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
  module.def("cuda_overlap_lse_forward", &overlap_lse_forward);
  module.def("cuda_overlap_lse_backward", &overlap_lse_backward);
  module.def("cuda_log_overlap_forward", &log_overlap_forward);
  module.def("cuda_log_overlap_backward", &log_overlap_backward);
  module.def("cuda_self_overlap_forward", &self_overlap_forward);
  module.def("cuda_self_overlap_backward", &self_overlap_backward);
  module.def("cuda_cs_divergence_forward", &cs_divergence_forward);
  module.def("cuda_cs_divergence_backward", &cs_divergence_backward);
  module.def("cuda_pairwise_forward", &pairwise_forward);
  module.def("cuda_pairwise_backward", &pairwise_backward);
  module.def("cuda_assign", &assign);
  module.attr("cuda_max_full_dim") = cuda::kMaxFullDim;
  module.def("cuda_full_overlap_lse_forward", &full_overlap_lse_forward);
  module.def("cuda_full_overlap_lse_backward", &full_overlap_lse_backward);
  module.def("cuda_full_pairwise_forward", &full_pairwise_forward);
  module.def("cuda_full_pairwise_backward", &full_pairwise_backward);
  module.def("cuda_full_assign", &full_assign);
}

}   // namespace csdiv
