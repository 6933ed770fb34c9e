// The functions of the CUDA backend for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace csdiv {

void bind_cuda(pybind11::module_& module);

}   // namespace csdiv
