// Executes PTX, what nvcc and Triton emit for a GPU, on the host: 32 lanes of a warp in one step, diverged ones by
// turns, one warp after another up to its next barrier, one block after another. tests/ptx.py translates PTX to the
// instructions here and hands over memory.
//
// Checked: alignment and bounds of every access; reads of what nobody wrote; writes to inputs; races in shared memory
// between barriers and in global memory between blocks; barriers that threads of a warp reach on different ways or
// after others have left; warp operations outside their mask. Counted: instructions of warps, bank conflicts, sectors.
// Not here: time, and what ptxas makes of PTX. An opcode that the table lacks is refused.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

constexpr int kLanes = 32;
constexpr u32 kEveryLane = ~0u;
constexpr u64 kSharedBase = 0x1000;   // an address of shared memory; 0 is none, and tensors are far above
constexpr u64 kSharedMax = 227 << 10, kParametersMax = 4096;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, u32 lanes);

// Who has to be there: one lane, the lanes of a mask, or the block.
enum class Kind : u8 { kPlain, kBranch, kExit, kOfWarp, kOfBlock };

// An opcode. `widths` are the bytes of its operands' registers, 0: any; empty: the handler looks itself.
struct Operation {
  Handler run;
  Kind kind = Kind::kPlain;
  std::vector<int> widths{};
};

// Operands are byte offsets of registers in a warp's file, or numbers. `guard` is the offset of a predicate, -1: none.
struct Instruction {
  Handler run;
  Kind kind;
  bool negated;
  s32 guard, line;
  const s32* operands;
};

const std::map<std::string, Operation>& operations();
std::map<std::string, Operation> other_operations();   // of them, those in ptx_moves.cpp

struct Counts {
  u64 executed = 0, lanes = 0;
  u64 cycles = 0, ideal_cycles = 0;     // of shared memory: what bank conflicts make of it
  u64 sectors = 0, ideal_sectors = 0;   // of 32 bytes in global memory
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<s32> operands;
  std::vector<u32> parameter_bytes, parameter_alignments;
  std::vector<std::pair<s32, u64>> constants;   // registers that hold the same number always
  std::vector<int> constant_widths;
  u64 file_bytes = 0, shared_bytes = 0;
  int max_threads = 0;
  s32 skipped_line = -1;
  u64 skipped = 0;   // how often
  std::vector<Counts> counts;
};

// Registers that every kernel has, in this order.
enum Special : s32 { kTid, kCtaid, kNtid, kNctaid, kLane, kWarpId, kZero, kOne, kParameters, kSpecials };
constexpr s32 kSpecialBytes = kLanes * 8;

// Lanes that are at the same instruction.
struct Group {
  s32 at;
  u32 lanes;
  Kind waits = Kind::kPlain;   // for other lanes of the warp, or for other warps
};

struct Warp {
  int index = 0;
  std::vector<char> file;
  std::vector<Group> groups;
  u32 alive = 0;
  u32 turns[kLanes] = {};   // warp barriers that a lane has been at
  u32 next_turn = 0;

  template <class T>
  T* lanes(s32 offset) {
    return reinterpret_cast<T*>(file.data() + offset);
  }
};

// The last accesses to four bytes, or to one. A stamp is the time since the last barrier of a block; it grows from
// block to block.
struct Cell {
  u32 written_at = 0, read_at = 0, read_before_at = 0;   // the last: by an earlier block of the same launch
  u32 write_turn = 0, read_turn = 0;
  u32 readers = 0, reading_warps = 0;
  u16 writer = 0, reading_warp = 0;
  bool written = false;
};

struct Buffer {
  u64 begin, end;
  bool read_only;
  std::string name;
  std::vector<Cell> cells;
  int unit = 4;   // bytes of a cell
};

enum class Order { kForward, kReverse, kRandom };

struct Machine {
  std::map<std::string, Kernel> kernels;
  std::vector<Buffer> buffers;   // sorted, disjoint
  size_t recent = 0;             // the buffer of the last access
  Kernel* kernel = nullptr;
  const Instruction* instruction = nullptr;
  std::vector<char> shared;
  std::vector<Cell> shared_cells;
  int shared_unit = 4;   // bytes of a cell
  u64 shared_bytes = 0;
  std::vector<char> parameters;
  std::vector<Warp> warps;
  u32 block = 0, threads = 0;
  u32 stamp = 0, launch_stamp = 0, block_stamp = 0;
  Order order = Order::kForward;
  bool counting = true, exact = false;
  std::map<std::string, std::pair<u64, std::string>> findings;
};

Machine& machine();

// Runs a kernel; `bytes` are those of its parameters.
void launch(Kernel& kernel, int64_t blocks, int threads, u64 dynamic_shared, const void* const* values,
            const u32* bytes, int count);

// Something is wrong; the kernel goes on.
void report(const char* what, int thread, const std::string& detail);
// It does not.
[[noreturn]] void fail(const std::string& what, int thread = -1);

// Memory. The addresses of `lanes` are checked and the access is noted; where each lane's bytes are on the host.
enum class Space { kGlobal, kShared, kGeneric, kParameters };
void access(Warp& warp, u32 lanes, Space space, const u64* addresses, int bytes, const char* const* values,
            char** places);

// Cuts what barriers let go.
inline void each(u32 lanes, const auto& body) {
  if (lanes == kEveryLane) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) body(l);
  } else {
    for (u32 rest = lanes; rest; rest &= rest - 1) body(__builtin_ctz(rest));
  }
}

}   // namespace ptx
