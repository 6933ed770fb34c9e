// Checks of what Python hands to the bindings: addresses as integers, sizes, the size of a number.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

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

// What an array of a call has numbers for: each row of a problem, or each problem; or it may be left out.
enum class Per { kRow, kProblem, kOptional };
using Kinds = std::vector<Per>;

// The arrays of a call in the order of csdiv/operators.py: the gradient of the value, outputs. All are checked here,
// before anything is read.
class Arrays {
 public:
  Arrays(const py::tuple& addresses, const Kinds& kinds, bool rows, bool problems) {
    check(addresses.size() == kinds.size() && kinds.size() <= kMost, "as many arrays as the operator has are needed");
    int k = 0;
    for (const Per per : kinds) {
      addresses_[k] = addresses[k].cast<Pointer>();
      const bool needed = per == Per::kRow ? rows : per == Per::kProblem ? problems : false;
      check(addresses_[k++] || !needed, "a pointer is null");
    }
  }

  template <class T>
  T* at(int k) const {
    return reinterpret_cast<T*>(addresses_[k]);
  }

 private:
  static constexpr size_t kMost = 8;

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
