// Blocks, warps and launches of the machine.
#include "ptx_machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

namespace ptx {
namespace {

constexpr u8 kPoison = 0xff;   // NaN of every float
constexpr s32 kNever = INT32_MAX;

std::mt19937 generator(1);

template <class T>
T* lanes_of(Warp& warp, s32 special) {
  return warp.lanes<T>(special * kSpecialBytes);
}

u32 guarded(Warp& warp, const Instruction& i, u32 lanes) {
  if (i.guard < 0) return lanes;
  const u32* const predicate = warp.lanes<u32>(i.guard);
  u32 passing = 0;
  for (int l = 0; l < kLanes; ++l) passing |= u32(bool(predicate[l]) != i.negated) << l;
  return lanes & passing;
}

void add_group(Warp& warp, s32 at, u32 lanes) {
  if (!lanes) return;
  for (Group& g : warp.groups)
    if (g.at == at) {
      g.lanes |= lanes, g.waits = Kind::kPlain;
      return;
    }
  warp.groups.push_back({at, lanes});
}

// The next group that can go on, taken out; `at` is -1 where there is none.
Group take_group(Warp& warp) {
  std::vector<size_t> ready;
  for (size_t k = 0; k < warp.groups.size(); ++k)
    if (warp.groups[k].waits == Kind::kPlain) ready.push_back(k);
  if (ready.empty()) return {-1, 0};
  size_t chosen = ready[0];
  if (machine().order == Order::kRandom)
    chosen = ready[generator() % ready.size()];
  else
    for (const size_t k : ready)
      if (warp.groups[k].at < warp.groups[chosen].at) chosen = k;
  const Group group = warp.groups[chosen];
  warp.groups.erase(warp.groups.begin() + chosen);
  return group;
}

// An operation of the lanes in a mask, which is its last operand. Lanes whose partners are elsewhere wait.
bool run_of_warp(Warp& warp, const Instruction& i, u32 lanes) {
  const u32* const masks = warp.lanes<u32>(i.operands[0]);
  for (u32 rest = lanes; rest;) {
    const int lane = __builtin_ctz(rest);
    const u32 mask = masks[lane];
    u32 members = 0;
    each(rest, [&](int l) { members |= u32(masks[l] == mask) << l; });
    rest &= ~members;
    if (members & ~mask) fail("a thread is not in the mask of its own warp operation", warp.index * kLanes + lane);
    if (mask & ~warp.alive) fail("a warp operation waits for a thread that has left", warp.index * kLanes + lane);
    if (members != mask) return false;
  }
  for (u32 rest = lanes; rest;) {
    const u32 mask = masks[__builtin_ctz(rest)];
    i.run(warp, i, mask);
    rest &= ~mask;
  }
  return true;
}

// Runs a group until it ends, waits, diverges or meets another one.
void run_group(Warp& warp, Group group) {
  Machine& m = machine();
  const Instruction* const code = m.kernel->code.data();
  Counts* const counts = m.kernel->counts.data();
  s32 meets = kNever;
  for (const Group& other : warp.groups)
    if (other.at > group.at) meets = std::min(meets, other.at);
  s32 at = group.at;
  for (;;) {
    const Instruction& i = code[at];
    m.instruction = &i;
    const u32 lanes = guarded(warp, i, group.lanes);
    ++counts[at].executed, counts[at].lanes += __builtin_popcount(lanes);
    if (i.line == m.kernel->skipped_line && i.kind != Kind::kPlain) {
      ++m.kernel->skipped, ++at;
    } else if (i.kind == Kind::kPlain) {
      if (lanes) i.run(warp, i, lanes);
      ++at;
    } else if (i.kind == Kind::kBranch) {
      add_group(warp, i.operands[0], lanes);
      add_group(warp, at + 1, group.lanes & ~lanes);
      return;
    } else if (i.kind == Kind::kExit) {
      warp.alive &= ~lanes;
      add_group(warp, at + 1, group.lanes & ~lanes);
      return;
    } else if (i.kind == Kind::kOfWarp) {
      if (lanes && !run_of_warp(warp, i, lanes)) {
        add_group(warp, at + 1, group.lanes & ~lanes);
        warp.groups.push_back({at, lanes, Kind::kOfWarp});
        return;
      }
      ++at;
    } else {
      if (!lanes) {
        ++at;
        continue;
      }
      add_group(warp, at + 1, group.lanes & ~lanes);
      warp.groups.push_back({at, lanes, Kind::kOfBlock});
      return;
    }
    if (at == meets) {
      add_group(warp, at, group.lanes);
      return;
    }
  }
}

void run_warp(Warp& warp) {
  for (;;) {
    const Group group = take_group(warp);
    if (group.at < 0) return;
    run_group(warp, group);
  }
}

// Lets go of a barrier that everybody is at; false: there is none.
bool release_block() {
  Machine& m = machine();
  const Instruction* const code = m.kernel->code.data();
  std::map<u32, u32> arrived;   // threads, by the barrier's number
  std::map<u32, u32> wanted;    // 0: all
  u32 alive = 0, left = 0;
  for (Warp& warp : m.warps) {
    alive += __builtin_popcount(warp.alive);
    for (const Group& g : warp.groups) {
      if (g.waits != Kind::kOfBlock) continue;
      const Instruction& i = code[g.at];
      const int lane = __builtin_ctz(g.lanes);
      const u32 barrier = warp.lanes<u32>(i.operands[0])[lane];
      arrived[barrier] += __builtin_popcount(g.lanes), wanted[barrier] = warp.lanes<u32>(i.operands[1])[lane];
    }
  }
  left = m.threads - alive;
  for (const auto& [barrier, count] : arrived) {
    if (count < (wanted[barrier] ? wanted[barrier] : alive)) continue;
    const Instruction* first = nullptr;
    u32 any = 0, all = 1;
    for (Warp& warp : m.warps) {
      const Instruction* first_of_warp = nullptr;
      for (Group& g : warp.groups) {
        const Instruction& i = code[g.at];
        if (g.waits != Kind::kOfBlock || warp.lanes<u32>(i.operands[0])[__builtin_ctz(g.lanes)] != barrier) continue;
        m.instruction = &i;
        const int thread = warp.index * kLanes + __builtin_ctz(g.lanes);
        if (first_of_warp)
          report("threads of a warp at a barrier on different ways", thread,
                 "line " + std::to_string(first_of_warp->line));
        if (left && !first && !wanted[barrier]) report("barrier after threads have left", thread, std::to_string(left));
        first = first_of_warp = &i;
        const u32* const values = warp.lanes<u32>(i.operands[3]);
        each(g.lanes, [&](int l) { any |= bool(values[l]), all &= bool(values[l]); });
      }
    }
    for (Warp& warp : m.warps) {
      std::vector<Group> groups;
      groups.swap(warp.groups);
      for (const Group& g : groups)
        if (g.waits != Kind::kOfBlock) warp.groups.push_back(g);
      for (const Group& g : groups) {
        if (g.waits != Kind::kOfBlock) continue;
        const Instruction& i = code[g.at];
        if (warp.lanes<u32>(i.operands[0])[__builtin_ctz(g.lanes)] != barrier) {
          warp.groups.push_back(g);
          continue;
        }
        // Operands: number, threads, result or none, value, which result.
        if (i.operands[2] >= 0)
          each(g.lanes, [&](int l) { warp.lanes<u32>(i.operands[2])[l] = i.operands[4] ? all : any; });
        add_group(warp, g.at + 1, g.lanes);
      }
    }
    ++m.stamp;
    return true;
  }
  return false;
}

std::vector<u32> in_order(size_t count) {
  std::vector<u32> turns(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (machine().order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  if (machine().order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), generator);
  return turns;
}

void run_block() {
  Machine& m = machine();
  m.block_stamp = ++m.stamp;
  std::fill(m.shared.begin(), m.shared.end(), char(kPoison));
  for (Warp& warp : m.warps) {
    const int count = std::min<int>(kLanes, m.threads - warp.index * kLanes);
    warp.alive = count == kLanes ? kEveryLane : (1u << count) - 1;
    warp.groups.assign(1, Group{0, warp.alive});
    std::fill_n(lanes_of<u32>(warp, kCtaid), kLanes, m.block);
  }
  for (;;) {
    for (const u32 k : in_order(m.warps.size())) run_warp(m.warps[k]);
    if (std::all_of(m.warps.begin(), m.warps.end(), [](const Warp& w) { return w.groups.empty(); })) return;
    if (release_block()) continue;
    std::string what = "threads wait for each other:";
    for (const Warp& warp : m.warps)
      for (const Group& g : warp.groups)
        what += " warp " + std::to_string(warp.index) + " at line " + std::to_string(m.kernel->code[g.at].line);
    fail(what);
  }
}

void make_warps(const Kernel& kernel, u32 threads, u32 blocks) {
  Machine& m = machine();
  m.threads = threads;
  m.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  for (size_t w = 0; w < m.warps.size(); ++w) {
    Warp& warp = m.warps[w];
    warp.index = int(w);
    warp.file.assign(kernel.file_bytes, char(kPoison));
    for (int l = 0; l < kLanes; ++l) {
      lanes_of<u32>(warp, kTid)[l] = u32(w * kLanes + l), lanes_of<u32>(warp, kLane)[l] = l;
      lanes_of<u32>(warp, kNtid)[l] = threads, lanes_of<u32>(warp, kNctaid)[l] = blocks;
      lanes_of<u32>(warp, kWarpId)[l] = u32(w);
      lanes_of<u32>(warp, kZero)[l] = 0, lanes_of<u32>(warp, kOne)[l] = 1;
      lanes_of<u64>(warp, kParameters)[l] = u64(m.parameters.data());
      for (size_t c = 0; c < kernel.constants.size(); ++c) {
        const auto [offset, value] = kernel.constants[c];
        if (kernel.constant_widths[c] == 8)
          warp.lanes<u64>(offset)[l] = value;
        else
          warp.lanes<u32>(offset)[l] = u32(value);
      }
    }
  }
}

void place_parameters(const Kernel& kernel, const void* const* values, const u32* bytes, int count) {
  Machine& m = machine();
  if (count != int(kernel.parameter_bytes.size()))
    fail(std::to_string(count) + " parameters for " + std::to_string(kernel.parameter_bytes.size()));
  m.parameters.assign(kParametersMax, char(kPoison));
  u64 at = 0;
  for (int k = 0; k < count; ++k) {
    const u32 alignment = kernel.parameter_alignments[k];
    if (bytes[k] != kernel.parameter_bytes[k])
      fail("parameter " + std::to_string(k) + " has " + std::to_string(bytes[k]) + " bytes, in PTX " +
           std::to_string(kernel.parameter_bytes[k]));
    at = (at + alignment - 1) / alignment * alignment;
    if (at + bytes[k] > kParametersMax) fail("too many parameters");
    std::memcpy(m.parameters.data() + at, values[k], bytes[k]);
    at += bytes[k];
  }
}

}   // namespace

void launch(Kernel& kernel, int64_t blocks, int threads, u64 dynamic_shared, const void* const* values,
            const u32* bytes, int count) {
  Machine& m = machine();
  m.kernel = &kernel, m.instruction = nullptr;
  if (kernel.max_threads && threads > kernel.max_threads) fail("more threads than the kernel was compiled for");
  m.shared_bytes = kernel.shared_bytes + dynamic_shared;
  if (m.shared_bytes > kSharedMax) fail("more shared memory than a block has");
  place_parameters(kernel, values, bytes, count);
  make_warps(kernel, u32(threads), u32(blocks));
  m.shared.resize(m.shared_bytes + 16);
  m.shared_cells.assign(m.shared_bytes / 4 + 4, Cell()), m.shared_unit = 4;
  m.launch_stamp = m.stamp + 1;
  for (const u32 block : in_order(blocks)) {
    m.block = block;
    run_block();
  }
}

Machine& machine() {
  static Machine machine;
  return machine;
}

std::string place() {
  const Machine& m = machine();
  std::string where = m.kernel ? m.kernel->name : "";
  if (m.instruction) where += ", PTX line " + std::to_string(m.instruction->line);
  return where;
}

void report(const char* what, int thread, const std::string& detail) {
  auto& [count, first] = machine().findings[std::string(what) + " | " + place()];
  if (!count++)
    first = "block " + std::to_string(machine().block) + ", thread " + std::to_string(thread) + ": " + detail;
}

void fail(const std::string& what, int thread) {
  std::string message = what + " | " + place();
  if (thread >= 0) message += ", block " + std::to_string(machine().block) + ", thread " + std::to_string(thread);
  throw std::runtime_error(message);
}

}   // namespace ptx
