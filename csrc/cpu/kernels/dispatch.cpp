#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#include "cpu/cpu.h"
#include "cpu/system/thread_pool.h"
#include "tile_kernels.h"

namespace csdiv::cpu {
namespace {

struct Isa {
  const char* name;
  bool supported;
  TileKernels<float> f32;
  TileKernels<double> f64;
  FullKernels full;
};

[[maybe_unused]] bool supports_baseline() {
  return true;
}

#if defined(__x86_64__)
[[maybe_unused]] bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool supports_avx512() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Widest last. No code of an instruction set runs where it is not supported, not even what returns its kernels.
const std::vector<Isa>& isas() {
#define CSDIV_ISA_ENTRY(isa)                                                                                \
  supports_##isa() ? Isa{#isa, true, isa::tile_kernels_f32(), isa::tile_kernels_f64(), isa::full_kernels()} \
                   : Isa{#isa, false, {}, {}, {}},
  static const std::vector<Isa> all = {CSDIV_FOR_EACH_ISA(CSDIV_ISA_ENTRY)};
#undef CSDIV_ISA_ENTRY
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

const FullKernels& full_kernels() {
  return selected().load(std::memory_order_relaxed)->full;
}

int64_t arithmetic(int64_t rounds, Arithmetic kind, int threads) {
  std::atomic<int64_t> computed{0};
  parallel_for(threads, threads, [&](int64_t) {
    volatile float half = 0.5f;   // not known to the compiler
    float kept = half;
    computed += tile_kernels<float>().arithmetic(rounds, kind, &kept);
    half = kept;
  });
  return computed;
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
