#include "memory.h"

#include <cstddef>
#include <new>
#include <vector>

namespace csdiv::cpu {
namespace {

constexpr int64_t kKeptBytes = int64_t(1) << 25;   // by a thread
constexpr std::size_t kKeptBlocks = 16;

void release(const Block& block) {
  ::operator delete(block.data, std::align_val_t(kCacheLine));
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
  return {::operator new(bytes, std::align_val_t(kCacheLine)), bytes};
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
