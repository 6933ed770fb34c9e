// Runs CUDA C++ on the host: the kernels of csrc/cuda/ are compiled with this in place of cuda_runtime.h, one fiber for
// each thread of a block, one block after the other. Finds wrong results, reads of shared memory that nobody wrote (it
// begins as NaN), writes beyond shared memory, missing barriers (threads run in several orders), threads that meet at
// different barriers and warps that exchange values with a lane that left. Says nothing of time, of memory order
// between blocks, or of what the hardware's approximations round to: those here err by as much, see approximations.h.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "approximations.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CSDIV_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(emulation::shared_memory(sizeof(Type)))

using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}

namespace emulation {

struct Driver {
  int device = 0;
  std::vector<int> devices_set;   // in this order
  bool capturing = false;
};

inline Driver& driver() {
  static Driver driver;
  return driver;
}

}   // namespace emulation

inline cudaError_t cudaGetDevice(int* device) {
  *device = emulation::driver().device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  emulation::driver().device = device;
  emulation::driver().devices_set.push_back(device);
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::driver().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  return cudaRuntimeGetVersion(version);
}
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct Index {
  unsigned x;
};

namespace emulation {

enum class Order { kForward, kReverse, kRandom };
enum class Wait { kNone, kBlock, kWarp };

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10, kCanaryBytes = 64;
constexpr unsigned char kPoison = 0xff, kCanary = 0xa5;

struct Fiber {
  ucontext_t context;   // where it begins
  jmp_buf state;        // where it goes on: jumps cost a tenth of a swapcontext, which asks the kernel for signal masks
  std::vector<char> stack;
  bool started, done;
  Wait wait;
  int line;                    // of the barrier that it waits at
  unsigned mask;               // of the warp operation
  unsigned char slots[2][8];   // what it shows to others, by turns: nobody is two exchanges ahead of another
  bool turn;
  void* fake_stack = nullptr;
};

struct Machine {
  std::mutex mutex;   // there is one, whatever the number of callers
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  int current = -1;
  unsigned block = 0;
  std::function<void()> kernel;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  Order order = Order::kForward;
  std::mt19937 random{0};
  int64_t blocks_run = 0, launches = 0;
  std::exception_ptr error;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void* scheduler_fake_stack = nullptr;
};

inline Machine& machine() {
  static Machine machine;
  return machine;
}

inline Fiber& fiber() {
  return machine().fibers[machine().current];
}

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("emulation: " + what);
}

inline void* shared_memory(size_t bytes) {
  if (bytes != machine().shared_bytes) fail("a kernel was launched with less or more shared memory than it uses");
  return machine().shared.data();
}

inline void to_scheduler() {
  Machine& m = machine();
  Fiber& self = fiber();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
  if (!_setjmp(self.state)) _longjmp(m.scheduler, 1);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

inline void entry() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine().scheduler_stack, &machine().scheduler_stack_bytes);
#endif
  try {
    machine().kernel();
  } catch (...) {
    machine().error = std::current_exception();
  }
  fiber().done = true;
  to_scheduler();
}

inline void resume(int k) {
  Machine& m = machine();
  m.current = k;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, m.fibers[k].stack.data(), kStackBytes);
#endif
  Fiber& next = m.fibers[k];
  if (!_setjmp(m.scheduler)) {
    if (std::exchange(next.started, true)) _longjmp(next.state, 1);
    setcontext(&next.context);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void wait(Wait kind, int line, unsigned mask = 0) {
  fiber().wait = kind;
  fiber().line = line;
  fiber().mask = mask;
  to_scheduler();
}

// Lets go what may go; false: nothing.
inline bool release() {
  std::vector<Fiber>& fibers = machine().fibers;
  const int count = int(fibers.size());
  if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.wait == Wait::kBlock; })) {
    for (const Fiber& f : fibers)
      if (f.line != fibers[0].line) fail("threads meet at different barriers");
    for (Fiber& f : fibers) f.wait = Wait::kNone;
    return true;
  }
  bool released = false;
  for (int warp = 0; warp < count; warp += kWarpSize) {
    Fiber& first = fibers[warp];
    if (first.wait != Wait::kWarp) continue;
    if (first.mask != ~0u || warp + kWarpSize > count) fail("warp operations are of whole warps here");
    bool all = true;
    for (int k = warp; k < warp + kWarpSize; ++k) {
      if (fibers[k].done) fail("a warp operation waits for a thread that has left");
      all &= fibers[k].wait == Wait::kWarp && fibers[k].line == first.line;
    }
    if (!all) continue;
    for (int k = warp; k < warp + kWarpSize; ++k) fibers[k].wait = Wait::kNone;
    released = true;
  }
  return released;
}

inline void run_block() {
  Machine& m = machine();
  const int count = int(m.fibers.size());
  for (Fiber& f : m.fibers) {
    f.started = f.done = f.turn = false;
    f.wait = Wait::kNone;
    if (f.stack.empty()) f.stack.resize(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  std::fill_n(m.shared.begin(), m.shared_bytes, kPoison);
  std::fill(m.shared.begin() + m.shared_bytes, m.shared.end(), kCanary);
  std::vector<int> turns(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (m.order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  for (;;) {
    if (m.order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), m.random);
    bool ran = false;
    for (int k : turns) {
      if (m.fibers[k].done || m.fibers[k].wait != Wait::kNone) continue;
      resume(k);
      if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
      ran = true;
    }
    if (std::all_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return f.done; })) break;
    if (!release() && !ran) fail("threads wait for each other at different barriers, or for one that has left");
  }
  if (std::any_of(m.shared.begin() + m.shared_bytes, m.shared.end(), [](unsigned char c) { return c != kCanary; }))
    fail("a kernel wrote beyond its shared memory");
  ++m.blocks_run;
}

// PTX in the place of the kernels, see tests/ptx.py; `names` of these, by their addresses.
struct Ptx {
  const char* (*launch)(const char*, int64_t, int, uint64_t, const void* const*, const uint32_t*, int) = nullptr;
  void (*add_buffer)(uint64_t, uint64_t, int, int, const char*) = nullptr;
  std::map<uintptr_t, std::string> names;
};

inline Ptx& ptx() {
  static Ptx ptx;
  return ptx;
}

// A piece of scratch memory.
inline void took(const void* piece, int64_t bytes) {
  if (piece && ptx().add_buffer) ptx().add_buffer(uint64_t(piece), uint64_t(bytes), false, false, "scratch");
}

template <class... Parameters>
void launch_ptx(int64_t blocks, int threads, size_t shared_bytes, void (*kernel)(Parameters...),
                const std::remove_cv_t<Parameters>&... arguments) {
  const auto name = ptx().names.find(reinterpret_cast<uintptr_t>(kernel));
  if (name == ptx().names.end()) fail("a kernel without a name");
  const uint32_t sizes[] = {sizeof(Parameters)...};
  const void* const pointers[] = {&arguments...};
  const char* const error =
      ptx().launch(name->second.c_str(), blocks, threads, shared_bytes, pointers, sizes, sizeof...(Parameters));
  if (error) throw std::runtime_error(error);
}

template <class... Parameters, class... Arguments>
void launch(int64_t blocks, int threads, size_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  ++m.launches;
  if (ptx().launch) {
    launch_ptx(blocks, threads, shared_bytes, kernel, arguments...);
    m.blocks_run += blocks;
    return;
  }
  if (shared_bytes > 64 << 10) fail("more shared memory than a block has at compute capability 7.5");
  if (int(m.fibers.size()) != threads) m.fibers = std::vector<Fiber>(threads);
  m.shared.resize(shared_bytes + kCanaryBytes);
  m.shared_bytes = shared_bytes;
  m.kernel = [&] { kernel(arguments...); };
  for (int64_t block = 0; block < blocks; ++block) {
    m.block = unsigned(block);
    run_block();
  }
}

// Shows `value` to the others, and waits for them.
template <class T>
int show(Wait kind, T value, int line, unsigned mask = 0) {
  static_assert(sizeof(T) <= sizeof(Fiber::slots[0]));
  const int turn = fiber().turn;
  std::memcpy(fiber().slots[turn], &value, sizeof(T));
  fiber().turn = !turn;
  wait(kind, line, mask);
  return turn;
}

template <class T>
T shown(const Fiber& fiber, int turn) {
  T value;
  std::memcpy(&value, fiber.slots[turn], sizeof(T));
  return value;
}

}   // namespace emulation

#define threadIdx (Index{unsigned(emulation::machine().current)})
#define blockIdx (Index{emulation::machine().block})

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::wait(emulation::Wait::kBlock, line);
}

inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  const int turn = emulation::show(emulation::Wait::kBlock, predicate, line);
  const std::vector<emulation::Fiber>& fibers = emulation::machine().fibers;
  return std::any_of(fibers.begin(), fibers.end(), [=](const auto& f) { return emulation::shown<int>(f, turn) != 0; });
}

inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulation::wait(emulation::Wait::kWarp, line, mask);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  const int turn = emulation::show(emulation::Wait::kWarp, value, line, mask);
  return emulation::shown<T>(emulation::machine().fibers[emulation::machine().current ^ lanes], turn);
}

namespace csdiv::cuda {

inline float approximate_reciprocal(float x) {
  return approximations::reciprocal(x);
}

inline float approximate_log2(float x) {
  return approximations::log2(x);
}

inline float approximate_exp2(float x) {
  return approximations::exp2(x);
}

}   // namespace csdiv::cuda
