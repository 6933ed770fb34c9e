// Memory of the machine: bounds, alignment, what was written, and who else was there.
#include <algorithm>
#include <cstring>

#include "ptx_machine.h"

namespace ptx {
namespace {

constexpr int kBankBytes = 4, kBanks = 32, kSectorBytes = 32;

std::string hex(u64 x) {
  char text[32];
  snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(x));
  return text;
}

Buffer& buffer_of(u64 address, int bytes, bool write, int thread) {
  Machine& m = machine();
  const auto inside = [&](const Buffer& b) { return address >= b.begin && address + bytes <= b.end; };
  if (m.recent < m.buffers.size() && inside(m.buffers[m.recent])) return m.buffers[m.recent];
  const auto after =
      std::upper_bound(m.buffers.begin(), m.buffers.end(), address, [](u64 x, const Buffer& b) { return x < b.begin; });
  const bool below = after == m.buffers.begin();
  const auto found = below ? after : after - 1;
  if (below || !inside(*found)) {
    const std::string where =
        below ? "" : ", " + std::to_string(address + bytes - found->end) + " bytes after " + found->name;
    fail((write ? "write" : "read") + std::string(" out of the bounds of global memory at ") + hex(address) + where,
         thread);
  }
  m.recent = found - m.buffers.begin();
  return *found;
}

// Cells of single bytes from now on.
void divide(std::vector<Cell>& cells, int& unit) {
  std::vector<Cell> divided(cells.size() * unit);
  for (size_t k = 0; k < divided.size(); ++k) divided[k] = cells[k / unit];
  cells = std::move(divided), unit = 1;
}

struct Access {
  Warp& warp;
  int lane;
  bool write, shared, same_value;
  int thread() const { return warp.index * kLanes + lane; }
};

void report_race(const Access& a, const char* kind, u64 address, const std::string& other) {
  report((std::string("race in ") + (a.shared ? "shared" : "global") + " memory: " + kind).c_str(), a.thread(),
         hex(address) + ", " + other);
}

std::string thread_of(u32 stamp, int thread) {
  return stamp < machine().block_stamp ? "by another block" : "by thread " + std::to_string(thread);
}

// Whether what another lane did at `stamp` comes before what this one does now.
bool ordered(const Access& a, u32 stamp, int warp, u32 turn) {
  const Machine& m = machine();
  if (stamp < m.launch_stamp) return true;
  if (stamp < m.block_stamp) return a.shared;   // another block: it had a shared memory of its own
  return stamp < m.stamp || (warp == a.warp.index && turn < a.warp.turns[a.lane]);
}

void check_read(const Access& a, const Cell& c, u64 address) {
  const Machine& m = machine();
  if (!c.written || (a.shared && c.written_at < m.block_stamp)) {
    report(a.shared ? "read of shared memory that was never written" : "read of global memory that was never written",
           a.thread(), hex(address));
  } else if (c.writer != a.thread() || c.written_at < m.block_stamp) {
    if (!ordered(a, c.written_at, c.writer / kLanes, c.write_turn))
      report_race(a, "read after write", address, thread_of(c.written_at, c.writer));
  }
}

void check_write(const Access& a, const Cell& c, u64 address) {
  const Machine& m = machine();
  const bool own = c.writer == a.thread() && c.written_at >= m.block_stamp;
  if (c.written && !own && !a.same_value && !ordered(a, c.written_at, c.writer / kLanes, c.write_turn))
    report_race(a, "write after write", address, thread_of(c.written_at, c.writer));
  if (!a.shared && (c.read_before_at >= m.launch_stamp || (c.read_at >= m.launch_stamp && c.read_at < m.block_stamp))) {
    report_race(a, "write after read", address, "by another block");
  } else if (c.read_at == m.stamp) {
    const u32 others = c.reading_warps & ~(1u << a.warp.index);
    const bool lanes =
        c.reading_warp == a.warp.index && c.readers & ~(1u << a.lane) && c.read_turn >= a.warp.turns[a.lane];
    if (others || lanes)
      report_race(a, "write after read", address, "by a thread of warp " + std::to_string(c.reading_warp));
  }
}

void note(const Access& a, Cell& c) {
  const Machine& m = machine();
  const u32 turn = a.warp.turns[a.lane];
  if (a.write) {
    c.written = true, c.written_at = m.stamp, c.writer = u16(a.thread()), c.write_turn = turn;
    return;
  }
  if (c.read_at >= m.launch_stamp && c.read_at < m.block_stamp) c.read_before_at = c.read_at;
  if (c.read_at != m.stamp) c.read_at = m.stamp, c.reading_warps = c.readers = 0;
  if (c.reading_warp != a.warp.index || c.read_turn != turn) c.readers = 0;
  c.reading_warps |= 1u << a.warp.index, c.readers |= 1u << a.lane;
  c.reading_warp = u16(a.warp.index), c.read_turn = turn;
}

// Shared memory takes a phase for 128 bytes, and a clock for each different word of one bank in it.
void count_banks(Counts& counts, u32 lanes, const u64* addresses, int bytes) {
  const int per_phase = std::min(kLanes, kBanks * kBankBytes / bytes);
  for (int begin = 0; begin < kLanes; begin += per_phase) {
    u64 words[kBanks][kLanes];
    int used[kBanks] = {}, most = 0;
    for (int l = begin; l < begin + per_phase; ++l) {
      if (!(lanes >> l & 1)) continue;
      for (int k = 0; k < bytes; k += kBankBytes) {
        const u64 word = (addresses[l] + k) / kBankBytes;
        const int bank = word % kBanks;
        if (std::find(words[bank], words[bank] + used[bank], word) == words[bank] + used[bank])
          words[bank][used[bank]++] = word;
        most = std::max(most, used[bank]);
      }
    }
    counts.cycles += most, counts.ideal_cycles += most > 0;
  }
}

void count_sectors(Counts& counts, u32 lanes, const u64* addresses, int bytes) {
  u64 sectors[kLanes];
  int used = 0, active = 0;
  each(lanes, [&](int l) {
    const u64 sector = addresses[l] / kSectorBytes;
    if (std::find(sectors, sectors + used, sector) == sectors + used) sectors[used++] = sector;
    ++active;
  });
  u64 first = ~u64(0), last = 0;
  each(lanes, [&](int l) { first = std::min(first, addresses[l]), last = std::max(last, addresses[l]); });
  const bool uniform = first == last;
  counts.sectors += used;
  counts.ideal_sectors += uniform ? 1 : (active * bytes + kSectorBytes - 1) / kSectorBytes;
}

}   // namespace

void access(Warp& warp, u32 lanes, Space space, const u64* addresses, int bytes, const char* const* values,
            char** places) {
  Machine& m = machine();
  const bool write = values != nullptr;
  const Instruction* const instruction = m.instruction;
  if (space == Space::kGeneric) {
    const u64 first = addresses[__builtin_ctz(lanes)];
    space = first < kSharedBase + kSharedMax ? Space::kShared : Space::kGlobal;
  }
  if (m.counting && space != Space::kParameters) {
    Counts& counts = m.kernel->counts[instruction - m.kernel->code.data()];
    (space == Space::kShared ? count_banks : count_sectors)(counts, lanes, addresses, bytes);
  }
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const u64 address = addresses[l];
    const int thread = warp.index * kLanes + l;
    if (address % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes at " + hex(address), thread);
    if (space == Space::kParameters) {
      const u64 begin = u64(m.parameters.data());
      if (address < begin || address + bytes > begin + m.parameters.size())
        fail("access out of the bounds of the parameters", thread);
      places[l] = reinterpret_cast<char*>(address);
      continue;
    }
    Cell* cells;
    int unit = sizeof(u32);
    if (space == Space::kShared) {
      if (address < kSharedBase || address + bytes > kSharedBase + m.shared_bytes)
        fail(std::string(write ? "write" : "read") + " out of the bounds of shared memory, at " +
                 std::to_string(s64(address - kSharedBase)) + " of " + std::to_string(m.shared_bytes) + " bytes",
             thread);
      places[l] = m.shared.data() + (address - kSharedBase);
      if (bytes < m.shared_unit) divide(m.shared_cells, m.shared_unit);
      unit = m.shared_unit, cells = &m.shared_cells[(address - kSharedBase) / unit];
    } else {
      Buffer& buffer = buffer_of(address, bytes, write, thread);
      if (write && buffer.read_only) report("write to an input", thread, buffer.name);
      places[l] = reinterpret_cast<char*>(address);
      if (bytes < buffer.unit) divide(buffer.cells, buffer.unit);
      unit = buffer.unit, cells = &buffer.cells[(address - buffer.begin) / unit];
    }
    Access a{warp, l, write, space == Space::kShared, false};
    for (int k = 0; k < bytes; k += unit) {
      Cell& cell = cells[k / unit];
      if (write) {
        a.same_value = !std::memcmp(values[l] + k, places[l] + k, unit);
        check_write(a, cell, address + k);
      } else {
        check_read(a, cell, address + k);
      }
      note(a, cell);
    }
    if (write) std::memcpy(places[l], values[l], bytes);
  }
}

}   // namespace ptx
