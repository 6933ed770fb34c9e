// Memory of the drivers: for one call, or of one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

namespace csdiv::cpu {

constexpr int64_t kCacheLine = 64;

// Memory on a cache line boundary. What was freed is kept: calls come one after the other, and to be given its pages
// anew would cost each of them up to a tenth of its time. Blocks below 1 MiB are kept by their thread until it ends, 4
// MiB of them at most; larger ones by the process, 256 MiB of them.
struct Block {
  void* data;
  int64_t bytes;
};
Block allocate_block(int64_t bytes);   // of as many bytes or more
void free_block(Block block);
void ask_for_huge_pages(void* data, int64_t bytes);   // for the whole ones in it; advice alone
void empty_cache();                                   // gives back what the process and this thread keep

// Uninitialised.
template <class T>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(int64_t size) : block_(allocate_block(size * int64_t(sizeof(T)))), size_(size) {}
  AlignedArray(AlignedArray&& other) noexcept { swap(other); }
  AlignedArray& operator=(AlignedArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~AlignedArray() { free_block(block_); }

  T* get() const { return static_cast<T*>(block_.data); }
  int64_t size() const { return size_; }

 private:
  void swap(AlignedArray& other) {
    std::swap(block_, other.block_);
    std::swap(size_, other.size_);
  }

  Block block_{nullptr, 0};
  int64_t size_ = 0;
};

template <class T>
AlignedArray<T> filled(int64_t size, T value) {
  AlignedArray<T> array(size);
  std::fill_n(array.get(), size, value);
  return array;
}

// Memory of the calling thread, kept between tasks; valid until the thread's next call.
template <class T>
T* scratch(int64_t size) {
  thread_local AlignedArray<T> array;
  if (array.size() < size) array = AlignedArray<T>(size);
  return array.get();
}

}   // namespace csdiv::cpu
