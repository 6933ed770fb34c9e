// What the kernels need of the platform. The tests compile the same sources for the host: with CSDIV_EMULATION every
// CUDA thread is a fiber, see tests/native/emulation.h.
#pragma once

#include <math.h>

#include <cfloat>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef CSDIV_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

#define CSDIV_SHARED(Type, name)                                 \
  extern __shared__ __align__(16) unsigned char shared_memory[]; \
  Type& name = *reinterpret_cast<Type*>(shared_memory)
#endif

#define CSDIV_DEVICE __device__ __forceinline__
#define CSDIV_HOST_DEVICE __host__ __device__ inline

namespace csdiv::cuda {

constexpr int kThreads = 256;   // of every block
constexpr int kWarp = 32;
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 4 ? 2 : 1;   // per multiprocessor: 128 registers, or 255

template <class T>
struct Float;

// Certified: with variances within these limits c^4 and delta^2 c^3 stay normal, and what underflows is below rounding.
template <>
struct Float<float> {
  static constexpr float kMax = FLT_MAX;
  static constexpr float kVarianceMin = 0x1p-20f, kVarianceMax = 0x1p20f, kDeltaMax = 0x1p30f;
  static constexpr int kScaleExponentMax = 62;   // 4^k is a normal number
  static constexpr int kTinyExponent = 64;       // smaller c are scaled, and delta by the root
  static constexpr float kTiny = 0x1p-64f, kTinyScale = 0x1p64f, kTinyRoot = 0x1p32f;
};

template <>
struct Float<double> {
  static constexpr double kMax = DBL_MAX;
  static constexpr double kVarianceMin = 0x1p-200, kVarianceMax = 0x1p200, kDeltaMax = 0x1p150;
  static constexpr int kScaleExponentMax = 500;
  static constexpr int kTinyExponent = 512;
  static constexpr double kTiny = 0x1p-512, kTinyScale = 0x1p512, kTinyRoot = 0x1p256;
};

constexpr double kLog2E = 1.4426950408889634074, kLog2 = 0.69314718055994530942, kLog2Pi = 1.8378770664093454836;

#ifndef CSDIV_EMULATION
// Of normal numbers: relative error 1 ulp.
CSDIV_DEVICE float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of normal numbers: error 2^-22, absolute between 1/2 and 2, else relative.
CSDIV_DEVICE float approximate_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-22; 0 below the normal numbers, and NaN of NaN.
CSDIV_DEVICE float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// In a loop: nothing that follows from x is kept in registers from one iteration to the next.
CSDIV_DEVICE void forget([[maybe_unused]] int& x) {
#ifndef CSDIV_EMULATION
  asm volatile("" : "+r"(x));
#endif
}

CSDIV_DEVICE double approximate_reciprocal(double x) {
  return 1.0 / x;
}
CSDIV_DEVICE double approximate_log2(double x) {
  return log2(x);
}
CSDIV_DEVICE double approximate_exp2(double x) {
  return exp2(x);
}

// kCount consecutive values, aligned to 16 bytes or to all of them.
template <int kCount>
CSDIV_DEVICE void load(const float* from, float (&to)[kCount]) {
  if constexpr (kCount == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
#pragma unroll
    for (int k = 0; k < kCount; k += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + k);
      to[k] = v.x, to[k + 1] = v.y, to[k + 2] = v.z, to[k + 3] = v.w;
    }
  }
}

template <int kCount>
CSDIV_DEVICE void load(const double* from, double (&to)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; k += 2) {
    const double2 v = *reinterpret_cast<const double2*>(from + k);
    to[k] = v.x, to[k + 1] = v.y;
  }
}

// Stores a vector of 16 bytes at once.
CSDIV_DEVICE void store(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
}

CSDIV_DEVICE void store(double* to, const double (&from)[2]) {
  *reinterpret_cast<double2*>(to) = {from[0], from[1]};
}

CSDIV_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Part {
  int begin, end;
};

// The k-th of `parts` parts of 0..size, as equal as can be.
CSDIV_HOST_DEVICE Part part(int64_t size, int64_t parts, int64_t k) {
  return {int(size * k / parts), int(size * (k + 1) / parts)};
}

// Where and on what a call runs; scratch memory is cut from the front.
struct Context {
  cudaStream_t stream;
  int processors;   // multiprocessors of the device
  int device;
  char* scratch;   // null: nothing is launched, `used` tells what is needed
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(scratch + used);
    used += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
#ifdef CSDIV_EMULATION
    if (scratch) emulation::took(array, count * int64_t(sizeof(T)));
#endif
    return array;
  }
};

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// The kernels that each device has loaded: a kernel is loaded at its first launch, which drivers may refuse while a
// graph is captured.
class Loaded {
 public:
  // Throws where the kernel would be loaded in a capture.
  void before_launch(const void* kernel, const Context& context) {
    if (has(kernel, context.device)) return;
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(context.stream, &status));
    const std::string device = "cuda:" + std::to_string(context.device);
    if (status != cudaStreamCaptureStatusNone)
      throw std::runtime_error("CUDA graph capture on " + device + ": call csdiv.warmup(\"" + device +
                               "\"), or the same function, before it");
  }

  void after_launch(const void* kernel, const Context& context) {
    const std::lock_guard lock(mutex_);
    kernels_.emplace(kernel, context.device);
  }

 private:
  bool has(const void* kernel, int device) {
    const std::lock_guard lock(mutex_);
    return kernels_.count({kernel, device});
  }

  std::mutex mutex_;
  std::set<std::pair<const void*, int>> kernels_;
};

inline Loaded& loaded() {
  static Loaded loaded;
  return loaded;
}

#if defined(__CUDACC__) || defined(CSDIV_EMULATION)
template <class... Parameters, class... Arguments>
void launch(const Context& context, int64_t blocks, int64_t shared_bytes, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (!context.scratch || blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: more blocks than a grid has");
  loaded().before_launch(reinterpret_cast<const void*>(kernel), context);
#ifdef CSDIV_EMULATION
  emulation::launch(blocks, kThreads, size_t(shared_bytes), kernel, arguments...);
#else
  constexpr int64_t kAlwaysAllowed = 48 << 10;
  if (shared_bytes > kAlwaysAllowed)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  // clang-format off
  kernel<<<unsigned(blocks), kThreads, size_t(shared_bytes), context.stream>>>(arguments...);
  // clang-format on
  check(cudaGetLastError());
#endif
  loaded().after_launch(reinterpret_cast<const void*>(kernel), context);
}
#endif

}   // namespace csdiv::cuda
