// What csdiv/backends/arrays.py does for a call, for the tensors of small calls, which are plain: one mixture a side,
// contiguous, without gradients to variances that components or dimensions share. There the interpreter would take
// longer than the kernel.
#pragma once

#include <pybind11/pybind11.h>

namespace csdiv {

// (arguments, outputs, gradients, what is to live until the kernel has run) of an operator, or None: some tensor is not
// plain, or one of neither p nor q is given. `spec` is that of csdiv/backends/cpu.py; `arrays` what a backward pass has
// in place of outputs, else None.
pybind11::object plain_call(const pybind11::tuple& spec, const pybind11::handle& tensors, const pybind11::handle& needs,
                            const pybind11::handle& arrays);

}   // namespace csdiv
