#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "tile_kernels.h"

namespace csdiv::cpu {
namespace {

struct Isa {
  const char* name;
  bool supported;
  TileKernels<float> f32;
  TileKernels<double> f64;
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
    list.push_back({"baseline", true, baseline::tile_kernels_f32(), baseline::tile_kernels_f64()});
#ifdef CSDIV_X86
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl");
    list.push_back({"avx2", has_avx2, avx2::tile_kernels_f32(), avx2::tile_kernels_f64()});
    list.push_back({"avx512", has_avx512, avx512::tile_kernels_f32(), avx512::tile_kernels_f64()});
#endif
    return list;
  }();
  return all;
}

const Isa* widest_supported() {
  const Isa* widest = nullptr;
  for (const Isa& isa : isas())
    if (isa.supported) widest = &isa;
  return widest;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{widest_supported()};
  return isa;
}

}   // namespace

template <>
const TileKernels<float>& tile_kernels() {
  return selected().load(std::memory_order_relaxed)->f32;
}

template <>
const TileKernels<double>& tile_kernels() {
  return selected().load(std::memory_order_relaxed)->f64;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

std::string current_isa() {
  return selected().load()->name;
}

void set_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (name != isa.name) continue;
    if (!isa.supported) throw std::invalid_argument("this machine does not support " + name);
    selected().store(&isa);
    return;
  }
  throw std::invalid_argument("no instruction set \"" + name + "\" was compiled in");
}

}   // namespace csdiv::cpu
