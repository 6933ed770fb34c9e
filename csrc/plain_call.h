// What csdiv/backends/arrays.py does for a call, for the tensors of small calls, which are plain: one mixture a side,
// contiguous, variances in full shape. There the interpreter would take longer than the kernel.
#pragma once

#include <pybind11/pybind11.h>

namespace csdiv {

// (arguments, outputs, gradients) of an operator, or None: some tensor is not plain, or neither of p nor of q. See
// csdiv.backends.arrays.plain_call.
pybind11::object plain_call(const pybind11::tuple& spec, const pybind11::handle& tensors, const pybind11::handle& needs,
                            const pybind11::handle& arrays);

}   // namespace csdiv
