// Registers of a warp as the types that instructions have.
#pragma once

#include <type_traits>

#include "ptx_machine.h"

namespace ptx {

// A register's lanes as a type: 8 bytes a lane for types of 8, else 4.
template <class T>
struct View {
  using Word = std::conditional_t<sizeof(T) == 8, u64, u32>;
  Word* words;

  View(Warp& warp, s32 offset) : words(warp.lanes<Word>(offset)) {}
  T operator[](int l) const {
    if constexpr (std::is_floating_point_v<T>)
      return __builtin_bit_cast(T, words[l]);
    else
      return T(words[l]);
  }
  void set(int l, T value) const {
    if constexpr (std::is_floating_point_v<T>)
      words[l] = __builtin_bit_cast(Word, value);
    else
      words[l] = Word(std::make_unsigned_t<T>(value));
  }
};

template <>
struct View<bool> {
  u32* words;

  View(Warp& warp, s32 offset) : words(warp.lanes<u32>(offset)) {}
  bool operator[](int l) const { return words[l]; }
  void set(int l, bool value) const { words[l] = value; }
};

template <class T>
constexpr int kWidth = sizeof(T) == 8 ? 8 : 4;

}   // namespace ptx
