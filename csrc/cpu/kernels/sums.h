// What drivers do with sums of gradients besides adding pairs to them.
#pragma once

#include "simd.h"

namespace csdiv::cpu::CSDIV_ISA {

// As many numbers as a vector of doubles has, and back: rounded.
template <class T>
inline Vec<double> load_doubles(const T* from) {
  typedef T Numbers __attribute__((vector_size(kLanes<double> * sizeof(T))));
  Numbers numbers;
  __builtin_memcpy(&numbers, from, sizeof(numbers));
  return __builtin_convertvector(numbers, Vec<double>);
}

template <class T>
inline void store_doubles(T* to, Vec<double> value) {
  typedef T Numbers __attribute__((vector_size(kLanes<double> * sizeof(T))));
  const Numbers numbers = __builtin_convertvector(value, Numbers);
  __builtin_memcpy(to, &numbers, sizeof(numbers));
}

template <class T>
bool finite(const T* numbers, int64_t count) {
  const auto is_not = [](Vec<T> number) {
    const BitsVec<T> largest = (BitsVec<T>)broadcast<T>(T(__builtin_inf()));
    return ((BitsVec<T>)number & largest) == largest;
  };
  IntVec<T> found{};
  int64_t k = 0;
  for (; k + kLanes<T> <= count; k += kLanes<T>) found |= is_not(load(numbers + k));
  for (; k < count; ++k) found |= is_not(broadcast<T>(numbers[k]));
  return !any<T>(found);
}

template <class T>
void add_sums(const T* from, int64_t count, double* to) {
  for (int64_t k = 0; k < count; k += kLanes<double>) store(to + k, load(to + k) + load_doubles(from + k));
}

template <class T>
void write_sums(const double* sums, int64_t count, double factor, bool add, T* out) {
  int64_t k = 0;
  for (; k + kLanes<double> <= count; k += kLanes<double>) {
    const Vec<double> value = factor * load(sums + k);
    store_doubles(out + k, add ? load_doubles(out + k) + value : value);
  }
  for (; k < count; ++k) out[k] = T(add ? out[k] + factor * sums[k] : factor * sums[k]);
}

template <class T>
void write_columns(const double* sums, int64_t stride, int64_t count, int64_t dim, double factor, bool add, T* out) {
  constexpr int64_t L = kLanes<double>;
  const int64_t whole_count = count / L * L, whole_dim = dim / L * L;
  for (int64_t k = 0; k < whole_count; k += L) {
    for (int64_t d = 0; d < whole_dim; d += L) {
      Vec<double> block[L];
      for (int64_t i = 0; i < L; ++i) block[i] = factor * load(sums + (d + i) * stride + k);
      transpose_block<double>(block);
      for (int64_t i = 0; i < L; ++i) {
        T* const to = out + (k + i) * dim + d;
        store_doubles(to, add ? load_doubles(to) + block[i] : block[i]);
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t d = k < whole_count ? whole_dim : 0; d < dim; ++d) {
      const double value = factor * sums[d * stride + k];
      out[k * dim + d] = T(add ? out[k * dim + d] + value : value);
    }
  }
}

}   // namespace csdiv::cpu::CSDIV_ISA
