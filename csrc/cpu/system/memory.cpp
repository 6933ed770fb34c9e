#include "cpu/system/memory.h"

#include <cstddef>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace csdiv::cpu {
namespace {

constexpr int64_t kKeptBytes = int64_t(1) << 25;   // by a thread
constexpr std::size_t kKeptBlocks = 16;

constexpr int64_t kHugePage = int64_t(1) << 21;

std::align_val_t alignment(int64_t bytes) {
  return std::align_val_t(bytes >= 4 * kHugePage ? kHugePage : kCacheLine);
}

Block new_block(int64_t bytes) {
  void* const data = ::operator new(bytes, alignment(bytes));
#ifdef MADV_HUGEPAGE
  // Small pages of what is used once cost more than the arithmetic on it. Advice alone: where it fails, nothing is
  // lost.
  if (alignment(bytes) == std::align_val_t(kHugePage)) (void)madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

void release(const Block& block) {
  ::operator delete(block.data, alignment(block.bytes));
}

thread_local bool ending = false;   // the thread is: what it frees from now on is not kept

// The blocks that a thread has freed, the last one last.
struct FreeBlocks {
  std::vector<Block> blocks;
  int64_t bytes = 0;

  ~FreeBlocks() {
    ending = true;
    for (const Block& block : blocks) release(block);
  }

  Block take(std::size_t k) {
    const Block block = blocks[k];
    blocks.erase(blocks.begin() + int64_t(k));
    bytes -= block.bytes;
    return block;
  }
};

thread_local FreeBlocks free_blocks;

}   // namespace

Block allocate_block(int64_t bytes) {
  if (bytes == 0) return {nullptr, 0};
  auto& blocks = free_blocks.blocks;
  for (std::size_t k = blocks.size(); k-- > 0;)
    if (blocks[k].bytes >= bytes && blocks[k].bytes / 2 <= bytes) return free_blocks.take(k);
  return new_block(bytes);
}

void free_block(Block block) {
  if (!block.data) return;
  if (ending || block.bytes > kKeptBytes) return release(block);
  while (free_blocks.bytes + block.bytes > kKeptBytes || free_blocks.blocks.size() == kKeptBlocks)
    release(free_blocks.take(0));
  free_blocks.blocks.push_back(block);
  free_blocks.bytes += block.bytes;
}

}   // namespace csdiv::cpu
