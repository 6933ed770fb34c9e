#include "cpu/system/memory.h"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace csdiv::cpu {
namespace {

constexpr int64_t kSharedBytes = int64_t(1) << 20;   // of a block, from which on all threads share what is kept
constexpr int64_t kKeptByAll = int64_t(1) << 28, kKeptByThread = int64_t(1) << 22;
constexpr std::size_t kKeptBlocks = 16;   // by all, and by each thread

constexpr int64_t kHugePage = int64_t(1) << 21;

std::align_val_t alignment(int64_t bytes) {
  return std::align_val_t(bytes >= 4 * kHugePage ? kHugePage : kCacheLine);
}

Block new_block(int64_t bytes) {
  void* const data = ::operator new(bytes, alignment(bytes));
  if (alignment(bytes) == std::align_val_t(kHugePage)) ask_for_huge_pages(data, bytes);
  return {data, bytes};
}

void release(const Block& block) {
#ifdef __linux__
  // The C library may keep what it is given back: its pages go to the system before.
  if (block.bytes >= kSharedBytes) {
    const auto page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(block.data);
    const uintptr_t first = (begin + page - 1) / page * page, end = (begin + uintptr_t(block.bytes)) / page * page;
    (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
  }
#endif
  ::operator delete(block.data, alignment(block.bytes));
}

// Blocks that were freed, the last one last.
class FreeBlocks {
 public:
  explicit FreeBlocks(int64_t limit) : limit_(limit) {}

  // One of `bytes` or more, up to twice as many; null: there is none.
  Block take(int64_t bytes) {
    for (std::size_t k = blocks_.size(); k-- > 0;)
      if (blocks_[k].bytes >= bytes && blocks_[k].bytes / 2 <= bytes) return remove(k);
    return {nullptr, 0};
  }

  void keep(const Block& block) {
    if (block.bytes > limit_) return release(block);
    while (bytes_ + block.bytes > limit_ || blocks_.size() == kKeptBlocks) release(remove(0));
    blocks_.push_back(block);
    bytes_ += block.bytes;
  }

  void clear() {
    while (!blocks_.empty()) release(remove(0));
  }

 private:
  Block remove(std::size_t k) {
    const Block block = blocks_[k];
    blocks_.erase(blocks_.begin() + int64_t(k));
    bytes_ -= block.bytes;
    return block;
  }

  const int64_t limit_;
  std::vector<Block> blocks_;
  int64_t bytes_ = 0;
};

thread_local bool ending = false;   // the thread is: what it frees from now on is not kept for it

struct BlocksOfThread : FreeBlocks {
  BlocksOfThread() : FreeBlocks(kKeptByThread) {}
  ~BlocksOfThread() {
    ending = true;
    clear();
  }
};
thread_local BlocksOfThread own_blocks;

std::mutex shared_mutex;
FreeBlocks& shared_blocks = *new FreeBlocks(kKeptByAll);   // never destroyed: threads may outlive static objects

// run() with the shared blocks locked; false where that would have to wait. Nothing waits: in a forked child the lock
// may be held for ever.
template <class F>
bool with_shared_blocks(const F& run) {
  const std::unique_lock<std::mutex> lock(shared_mutex, std::try_to_lock);
  if (lock) run();
  return bool(lock);
}

}   // namespace

Block allocate_block(int64_t bytes) {
  if (bytes == 0) return {nullptr, 0};
  Block found{nullptr, 0};
  if (bytes < kSharedBytes)
    found = own_blocks.take(bytes);
  else
    with_shared_blocks([&] { found = shared_blocks.take(bytes); });
  return found.data ? found : new_block(bytes);
}

void free_block(Block block) {
  if (!block.data) return;
  if (block.bytes >= kSharedBytes) {
    if (!with_shared_blocks([&] { shared_blocks.keep(block); })) release(block);
  } else if (ending) {
    release(block);
  } else {
    own_blocks.keep(block);
  }
}

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  // Small pages of what is used once cost more than the arithmetic on it. Advice alone: where it fails, nothing is
  // lost.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), size = kHugePage;
  const uintptr_t first = (begin + size - 1) / size * size, end = (begin + uintptr_t(bytes)) / size * size;
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void empty_cache() {
  own_blocks.clear();
  with_shared_blocks([] { shared_blocks.clear(); });
}

}   // namespace csdiv::cpu
