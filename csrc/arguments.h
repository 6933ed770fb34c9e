// Checks of what Python hands to the bindings: addresses as integers, sizes, the size of a number.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

namespace csdiv {

namespace py = pybind11;

using Pointer = uintptr_t;

inline void check(bool condition, const char* message) {
  if (!condition) throw py::value_error(message);
}

inline void check_sizes(std::initializer_list<int64_t> sizes) {
  int64_t product = sizeof(double);
  for (const int64_t size : sizes) {
    check(size >= 0, "sizes must not be negative");
    check(!__builtin_mul_overflow(product, size, &product), "an array is too large");
  }
}

template <class T>
T* pointer(Pointer address, bool needed = true) {
  check(address || !needed, "a pointer is null");
  return reinterpret_cast<T*>(address);
}

// The arrays of a call in the order of csdiv/operators.py: the gradient of the value, outputs.
class Arrays {
 public:
  Arrays(const py::tuple& addresses) : count_(int(addresses.size())) {
    check(count_ <= kMost, "too many arrays");
    for (int k = 0; k < count_; ++k) addresses_[k] = addresses[k].cast<Pointer>();
  }

  template <class T>
  T* at(int k, bool needed) const {
    check(k < count_, "an array is missing");
    return pointer<T>(addresses_[k], needed);
  }

 private:
  static constexpr int kMost = 4;

  int count_;
  Pointer addresses_[kMost];
};

// The sides of a call, or their gradients: p and q.
inline py::tuple one_of_two(const py::tuple& sides, int k) {
  check(sides.size() == 2, "p and q are needed");
  return sides[k].cast<py::tuple>();
}

// Calls f(float{}) or f(double{}); f takes what it needs of Python objects before it releases the lock.
template <class F>
auto with_type(int itemsize, const F& f) {
  if (itemsize == 4) return f(float{});
  if (itemsize == 8) return f(double{});
  throw py::value_error("itemsize must be 4 or 8");
}

}   // namespace csdiv
