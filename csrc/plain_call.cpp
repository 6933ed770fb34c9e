#include "plain_call.h"

#include <pybind11/gil_safe_call_once.h>

#include <cstdint>
#include <string>

namespace csdiv {
namespace {

namespace py = pybind11;

// Names and functions of Python, looked up once and kept as long as the process lives.
struct Names {
  py::handle shape = intern("shape"), dtype = intern("dtype"), data_ptr = intern("data_ptr"),
             is_contiguous = intern("is_contiguous"), new_empty = intern("new_empty");
  py::handle empty_like = torch("empty_like"), large_empty_like = of("csdiv.backends.arrays", "empty_like");
  py::handle float32 = torch("float32"), float64 = torch("float64");

  static py::handle intern(const char* name) { return PyUnicode_InternFromString(name); }
  static py::handle torch(const char* name) { return of("torch", name); }
  static py::handle of(const char* module, const char* name) {
    return py::object(py::module_::import(module).attr(name)).release();
  }
};

const Names& names() {
  // Python's lock may change hands while modules are looked up: a static that another lock guards would wait for ever.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<const Names*> found;
  return *found.call_once_and_store_result([] { return new const Names(); }).get_stored();
}

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call_method(py::handle tensor, py::handle name) {
  return checked(PyObject_CallMethodNoArgs(tensor.ptr(), name.ptr()));
}

py::object attribute(py::handle tensor, py::handle name) {
  return checked(PyObject_GetAttr(tensor.ptr(), name.ptr()));
}

py::object address(py::handle tensor) {
  return call_method(tensor, names().data_ptr);
}

constexpr int64_t kMany = int64_t(1) << 18;   // numbers, from which on an array may have memory that is kept

py::object empty_like(py::handle tensor, int64_t size = 0) {
  const py::handle function = size < kMany ? names().empty_like : names().large_empty_like;
  return checked(PyObject_CallOneArg(function.ptr(), tensor.ptr()));
}

bool is_contiguous(py::handle tensor) {
  return call_method(tensor, names().is_contiguous).is(py::handle(Py_True));
}

// A contiguous tensor of this dtype and number of dimensions; its shape.
bool read(py::handle tensor, py::handle dtype, Py_ssize_t ndim, int64_t* shape) {
  if (!attribute(tensor, names().dtype).is(dtype)) return false;
  const py::object sizes = attribute(tensor, names().shape);
  if (PyTuple_GET_SIZE(sizes.ptr()) != ndim || !is_contiguous(tensor)) return false;
  for (Py_ssize_t k = 0; k < ndim; ++k) shape[k] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), k));
  return true;
}

// Of one side: its fields, see bindings.cpp, and the addresses of its gradients.
struct PlainSide {
  py::object fields, grads, spread;   // the variances in full shape
  int64_t n = 0, dim = 0;

  // `count` tensors from `first` on; false: they are not plain.
  bool read_from(PyObject* const* tensors, PyObject* const* needs, int count, py::handle dtype, py::list& made) {
    int64_t means[2], variances[2], weights[1];
    if (!read(tensors[0], dtype, 2, means) || !read(tensors[1], dtype, 2, variances)) return false;
    n = means[0], dim = means[1];
    const bool own = variances[0] == n && variances[1] == dim;   // else shared, which gradients would be summed for
    if (!own && (needs[1] == Py_True || n == 0)) return false;
    spread = py::reinterpret_borrow<py::object>(tensors[1]);
    if (!own) spread = spread.attr("expand")(n, dim).attr("contiguous")();
    const bool weighted = count == 3 && tensors[2] != Py_None;
    if (weighted && (!read(tensors[2], dtype, 1, weights) || weights[0] != n)) return false;
    const py::int_ none(0), one(1);
    const py::object log_weights = weighted ? address(tensors[2]) : py::object(none);
    fields = py::make_tuple(address(tensors[0]), address(spread), log_weights, none, one, py::int_(n),
                            py::bool_(variances[1] == 1), py::bool_(variances[0] == 1));
    py::object found[3] = {none, none, none};
    for (int k = 0; k < count; ++k) {
      if (needs[k] != Py_True || tensors[k] == Py_None) continue;
      const py::object grad = empty_like(tensors[k], k < 2 ? n * dim : n);
      found[k] = address(grad);
      made.append(grad);
    }
    grads = py::make_tuple(found[0], found[1], found[2]);
    return true;
  }
};

// The outputs of an operator, (*sizes) with N, M or digits, wide: float64; those alike made of the one before.
py::list make_outputs(const py::tuple& kinds, py::handle means, const PlainSide& p, const PlainSide& q) {
  py::list made;
  py::handle before;
  for (const py::handle kind : kinds) {
    const py::tuple output = py::reinterpret_borrow<py::tuple>(kind);
    if (before && output.equal(before)) {
      made.append(empty_like(PyList_GET_ITEM(made.ptr(), PyList_GET_SIZE(made.ptr()) - 1)));
      continue;
    }
    before = kind;
    py::list shape;
    for (const char letter : output[0].cast<std::string>())
      shape.append(letter == 'N' ? p.n : letter == 'M' ? q.n : int64_t(letter - '0'));
    const py::tuple sizes(shape);
    if (PyTuple_GET_ITEM(output.ptr(), 1) == Py_True)
      made.append(
          means.attr(names().new_empty)(sizes, py::arg("dtype") = py::reinterpret_borrow<py::object>(names().float64)));
    else
      made.append(means.attr(names().new_empty)(sizes));
  }
  return made;
}

}   // namespace

py::object plain_call(const py::tuple& spec, const py::handle& tensors, const py::handle& needs,
                      const py::handle& arrays) {
  const py::object given = checked(PySequence_Fast(tensors.ptr(), "tensors")),
                   wanted = checked(PySequence_Fast(needs.ptr(), "needs"));
  PyObject* const* const from = PySequence_Fast_ITEMS(given.ptr());
  PyObject* const* const need = PySequence_Fast_ITEMS(wanted.ptr());
  const int of_p = spec[0].cast<int>(), of_q = spec[1].cast<int>(), of_neither = spec[2].cast<int>();
  const Py_ssize_t count = of_p + of_q + of_neither;
  if (PySequence_Fast_GET_SIZE(given.ptr()) != count || PySequence_Fast_GET_SIZE(wanted.ptr()) != count)
    return py::none();
  for (Py_ssize_t k = of_p + of_q; k < count; ++k)
    if (from[k] != Py_None) return py::none();
  const py::object dtype = attribute(from[0], names().dtype);
  const bool wide = dtype.is(names().float64);
  if (!wide && !dtype.is(names().float32)) return py::none();

  PlainSide p, q;
  py::list grads;
  if (!p.read_from(from, need, of_p, dtype, grads)) return py::none();
  if (of_q && (!q.read_from(from + of_p, need + of_p, of_q, dtype, grads) || q.dim != p.dim)) return py::none();
  const py::object nothing = py::make_tuple(0, 0, 0);
  py::list outputs = arrays.is_none() ? make_outputs(spec[3], from[0], p, of_q ? q : p)
                                      : py::list(py::reinterpret_borrow<py::object>(arrays));
  py::list addresses;
  for (const py::handle array : outputs) {
    if (!is_contiguous(array)) return py::none();
    addresses.append(address(array));
  }
  for (int k = 0; k < 2 * of_neither; ++k) addresses.append(0);
  const py::tuple arguments =
      py::make_tuple(wide ? 8 : 4, 1, p.dim, py::tuple(addresses), py::make_tuple(p.fields, of_q ? q.fields : p.fields),
                     py::make_tuple(p.grads, of_q ? q.grads : nothing));
  return py::make_tuple(arguments, outputs, grads, py::make_tuple(p.spread, of_q ? q.spread : p.spread));
}

}   // namespace csdiv
