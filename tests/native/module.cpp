// csdiv's CUDA backend on the host: the functions that csdiv._C has where it is built with nvcc, and the emulation's
// own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/bindings.h"
#include "cuda/row_sums.h"
#include "emulation.h"

namespace py = pybind11;

namespace {

// Tiles of pairs that each block of D_CS's row sums has, for a batch of n components against m.
template <class T>
std::vector<int> row_blocks(int64_t batch, int64_t n, int64_t m, int processors) {
  using namespace csdiv::cuda;
  Mixture<T> p{}, q{};
  p.items = q.items = batch, p.n = n, q.n = m;
  RowTasks<T> tasks{{{{batch, 1, p, q, {}}, false}, {{batch, 1, p, p, {}}, true}, {{batch, 1, q, q, {}}, true}}, 3};
  tasks.cut(processors);
  std::vector<int> tiles;
  for (const RowTask<T>& task : tasks.tasks)
    for (int64_t k = 0; k < task.blocks; ++k) {
      const Part columns = task.block(k).columns;
      tiles.push_back(columns.end - columns.begin);
    }
  return tiles;
}

}   // namespace

PYBIND11_MODULE(csdiv_emulation, module) {
  csdiv::bind_cuda(module);
  py::enum_<emulation::Order>(module, "Order", py::module_local())
      .value("FORWARD", emulation::Order::kForward)
      .value("REVERSE", emulation::Order::kReverse)
      .value("RANDOM", emulation::Order::kRandom);
  module.def("set_order", [](emulation::Order order) { emulation::machine().order = order; });
  module.def("use_ptx", [](uintptr_t launch, uintptr_t add_buffer, const std::map<uintptr_t, std::string>& names) {
    emulation::Ptx& ptx = emulation::ptx();
    ptx.launch = reinterpret_cast<decltype(ptx.launch)>(launch);
    ptx.add_buffer = reinterpret_cast<decltype(ptx.add_buffer)>(add_buffer);
    ptx.names = names;
  });
  module.def("address", [] { return reinterpret_cast<uintptr_t>(&emulation::machine); });
  module.def("set_capturing", [](bool capturing) { emulation::driver().capturing = capturing; });
  module.def("devices_set", [] { return std::exchange(emulation::driver().devices_set, {}); });
  module.def("blocks_run", [] { return emulation::machine().blocks_run; });
  module.def("launches", [] { return emulation::machine().launches; });
  module.def("row_blocks", [](int itemsize, int64_t batch, int64_t n, int64_t m, int processors) {
    return (itemsize == 4 ? row_blocks<float> : row_blocks<double>)(batch, n, m, processors);
  });
}
