// The machine's functions for tests/ptx.py.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "ptx_machine.h"

using namespace ptx;

namespace {

std::string text;

}   // namespace

extern "C" {

// An instruction is a row of ints: index of its name, guard, negated, line, first operand, number of operands. Widths
// are the bytes of each operand's register, 0 for numbers. Null, or what is wrong.
const char* ptx_add_kernel(const char* name, const char* const* names, const s32* rows, int count, const s32* operands,
                           const s32* widths, int operand_count, const s32* parameters, int parameter_count,
                           const s32* constant_offsets, const s32* constant_widths, const u64* constant_values,
                           int constant_count, u64 file_bytes, u64 shared_bytes, int max_threads) {
  Kernel& kernel = machine().kernels[name];
  kernel = Kernel();
  kernel.name = name, kernel.file_bytes = file_bytes, kernel.shared_bytes = shared_bytes,
  kernel.max_threads = max_threads;
  kernel.operands.assign(operands, operands + operand_count);
  kernel.counts.resize(count);
  for (int k = 0; k < parameter_count; ++k)
    kernel.parameter_bytes.push_back(parameters[2 * k]), kernel.parameter_alignments.push_back(parameters[2 * k + 1]);
  for (int k = 0; k < constant_count; ++k)
    kernel.constants.emplace_back(constant_offsets[k], constant_values[k]),
        kernel.constant_widths.push_back(constant_widths[k]);
  for (int k = 0; k < count; ++k) {
    const s32* const row = rows + 6 * k;
    const auto found = operations().find(names[row[0]]);
    if (found == operations().end()) {
      text = std::string("PTX line ") + std::to_string(row[3]) + ": no opcode " + names[row[0]];
      return text.c_str();
    }
    const Operation& operation = found->second;
    for (size_t o = 0; o < operation.widths.size(); ++o)
      if (operation.widths[o] && (int(o) >= row[5] || operation.widths[o] != widths[row[4] + o])) {
        text = std::string("PTX line ") + std::to_string(row[3]) + ": operand " + std::to_string(o) + " of " +
               names[row[0]];
        return text.c_str();
      }
    kernel.code.push_back(
        {operation.run, operation.kind, bool(row[2]), row[1], row[3], kernel.operands.data() + row[4]});
  }
  return nullptr;
}

const char* ptx_launch(const char* name, int64_t blocks, int threads, u64 dynamic_shared, const void* const* values,
                       const u32* bytes, int count) {
  const auto found = machine().kernels.find(name);
  try {
    if (found == machine().kernels.end()) throw std::runtime_error(std::string("no kernel ") + name);
    launch(found->second, blocks, threads, dynamic_shared, values, bytes, count);
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

// `written`: the memory has been written before.
void ptx_add_buffer(u64 begin, u64 bytes, int written, int read_only, const char* name) {
  if (!bytes) return;
  std::vector<Buffer>& buffers = machine().buffers;
  const auto after =
      std::upper_bound(buffers.begin(), buffers.end(), begin, [](u64 x, const Buffer& b) { return x < b.begin; });
  if (after != buffers.begin() && (after - 1)->begin == begin) return;
  Cell cell;
  cell.written = written;
  buffers.insert(after, Buffer{begin, begin + bytes, bool(read_only), name, std::vector<Cell>(bytes / 4 + 1, cell)});
  machine().recent = 0;
}

void ptx_clear_buffers() {
  machine().buffers.clear();
}

void ptx_set(int order, int exact, int counting) {
  machine().order = Order(order), machine().exact = exact, machine().counting = counting;
}

// Leaves out the operation of a warp or block at a line; how often the one before was left out.
u64 ptx_skip(const char* name, int line) {
  u64 skipped = 0;
  for (auto& [_, kernel] : machine().kernels) skipped += std::exchange(kernel.skipped, 0), kernel.skipped_line = -1;
  const auto found = machine().kernels.find(name);
  if (found != machine().kernels.end()) found->second.skipped_line = line;
  return skipped;
}

// What was found since the last call, a line each.
const char* ptx_findings() {
  text.clear();
  for (const auto& [what, found] : machine().findings)
    text += what + " | " + std::to_string(found.first) + " times, first in " + found.second + "\n";
  machine().findings.clear();
  return text.c_str();
}

// Instructions of warps that a kernel has executed since its counts were last cleared.
u64 ptx_executed(const char* name) {
  u64 sum = 0;
  const auto found = machine().kernels.find(name);
  if (found != machine().kernels.end())
    for (const Counts& c : found->second.counts) sum += c.executed;
  return sum;
}

void ptx_clear_counts() {
  for (auto& [_, kernel] : machine().kernels) kernel.counts.assign(kernel.code.size(), Counts());
}

// A line for each instruction: line, executed, lanes, clocks of shared memory, without conflicts, sectors, at best.
const char* ptx_counts(const char* name) {
  text.clear();
  const auto found = machine().kernels.find(name);
  if (found == machine().kernels.end()) return text.c_str();
  const Kernel& kernel = found->second;
  for (size_t k = 0; k < kernel.code.size(); ++k) {
    const Counts& c = kernel.counts[k];
    for (const u64 x :
         {u64(kernel.code[k].line), c.executed, c.lanes, c.cycles, c.ideal_cycles, c.sectors, c.ideal_sectors})
      text += std::to_string(x) + " ";
    text += "\n";
  }
  return text.c_str();
}

}   // extern "C"
