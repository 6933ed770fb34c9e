// Opcodes of PTX that move: registers, memory, and what lanes show each other.
#include <cstring>

#include "ptx_lanes.h"

namespace ptx {
namespace {

// Operands: 0 and, 1 or, 2 xor, 3 not, 4 mov; result; two predicates, each with whether it is negated.
void predicates(Warp& warp, const Instruction& i, u32 lanes) {
  const View<bool> to(warp, i.operands[1]), a(warp, i.operands[2]), b(warp, i.operands[4]);
  each(lanes, [&](int l) {
    const bool x = a[l] != bool(i.operands[3]), y = b[l] != bool(i.operands[5]);
    to.set(l, i.operands[0] == 0   ? x && y
              : i.operands[0] == 1 ? x || y
              : i.operands[0] == 2 ? x != y
              : i.operands[0] == 3 ? !x
                                   : x);
  });
}

// Operands: wide register, bytes of a part, parts.
void take_apart(Warp& warp, const Instruction& i, u32 lanes) {
  const int bytes = i.operands[1], parts = i.operands[2];
  each(lanes, [&](int l) {
    const u64 wide = bytes * parts == 8 ? warp.lanes<u64>(i.operands[0])[l] : warp.lanes<u32>(i.operands[0])[l];
    for (int k = 0; k < parts; ++k)
      if (i.operands[3 + k] >= 0)
        warp.lanes<u32>(i.operands[3 + k])[l] = u32(bytes == 4 ? wide >> 32 * k : wide >> 16 * k & 0xffff);
  });
}

void put_together(Warp& warp, const Instruction& i, u32 lanes) {
  const int bytes = i.operands[1], parts = i.operands[2];
  each(lanes, [&](int l) {
    u64 wide = 0;
    for (int k = 0; k < parts; ++k) {
      const u32 part = warp.lanes<u32>(i.operands[3 + k])[l];
      wide |= u64(bytes == 4 ? part : part & 0xffff) << 8 * bytes * k;
    }
    if (bytes * parts == 8)
      warp.lanes<u64>(i.operands[0])[l] = wide;
    else
      warp.lanes<u32>(i.operands[0])[l] = u32(wide);
  });
}

// Operands: space, elements, bytes of one, signed, base, bytes of its register, offset; a register and its bytes each.
struct Transfer {
  Space space;
  int count, bytes;
  bool is_signed;
  u64 addresses[kLanes];
  const s32* registers;

  Transfer(Warp& warp, const Instruction& i, u32 lanes)
      : space(Space(i.operands[0])),
        count(i.operands[1]),
        bytes(i.operands[2]),
        is_signed(i.operands[3]),
        registers(i.operands + 7) {
    const s64 offset = i.operands[6];
    if (i.operands[5] == 8)
      each(lanes, [&](int l) { addresses[l] = warp.lanes<u64>(i.operands[4])[l] + offset; });
    else
      each(lanes, [&](int l) { addresses[l] = u32(warp.lanes<u32>(i.operands[4])[l] + offset); });
  }
};

void load(Warp& warp, const Instruction& i, u32 lanes) {
  const Transfer t(warp, i, lanes);
  char* places[kLanes];
  access(warp, lanes, t.space, t.addresses, t.count * t.bytes, nullptr, places);
  for (int k = 0; k < t.count; ++k) {
    const s32 to = t.registers[2 * k], width = t.registers[2 * k + 1];
    if (to < 0) continue;
    for (u32 rest = lanes; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      u64 value = 0;
      std::memcpy(&value, places[l] + k * t.bytes, t.bytes);
      if (t.is_signed) value = u64(s64(value << (64 - 8 * t.bytes)) >> (64 - 8 * t.bytes));
      if (width == 8)
        warp.lanes<u64>(to)[l] = value;
      else
        warp.lanes<u32>(to)[l] = u32(value);
    }
  }
}

void store(Warp& warp, const Instruction& i, u32 lanes) {
  const Transfer t(warp, i, lanes);
  char* places[kLanes];
  const char* values[kLanes];
  alignas(16) char bytes[kLanes][16];
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    for (int k = 0; k < t.count; ++k) {
      const s32 from = t.registers[2 * k];
      const u64 value = t.registers[2 * k + 1] == 8 ? warp.lanes<u64>(from)[l] : warp.lanes<u32>(from)[l];
      std::memcpy(bytes[l] + k * t.bytes, &value, t.bytes);
    }
    values[l] = bytes[l];
  }
  access(warp, lanes, t.space, t.addresses, t.count * t.bytes, values, places);
}

// Operations of a warp: the first operand is the mask's register.

void meet(Warp& warp, const Instruction&, u32 lanes) {
  const u32 turn = ++warp.next_turn;
  each(lanes, [&](int l) { warp.turns[l] = turn; });
}

// Operands: mask, result, predicate or -1, value, lane, clamp and segment; 0 up, 1 down, 2 butterfly, 3 index.
void shuffle(Warp& warp, const Instruction& i, u32 lanes) {
  u32 values[kLanes];
  std::memcpy(values, warp.lanes<u32>(i.operands[3]), sizeof(values));
  const View<u32> by(warp, i.operands[4]), clamps(warp, i.operands[5]);
  u32 results[kLanes], inside[kLanes];
  for (u32 rest = lanes; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const int b = by[l] & 31, clamp = clamps[l] & 31, segment = clamps[l] >> 8 & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from = 0;
    bool valid = false;
    switch (i.operands[6]) {
      case 0:
        from = l - b, valid = from >= last;
        break;
      case 1:
        from = l + b, valid = from <= last;
        break;
      case 2:
        from = l ^ b, valid = from <= last;
        break;
      default:
        from = first | (b & ~segment), valid = from <= last;
    }
    if (!valid) from = l;
    if (!(lanes >> from & 1))
      report("shuffle from a lane outside the mask", warp.index * kLanes + l, "lane " + std::to_string(from));
    results[l] = lanes >> from & 1 ? values[from] : 0xfefefefeu, inside[l] = valid;
  }
  each(lanes, [&](int l) {
    warp.lanes<u32>(i.operands[1])[l] = results[l];
    if (i.operands[2] >= 0) warp.lanes<u32>(i.operands[2])[l] = inside[l];
  });
}

// Operands: mask, result, value.
template <auto combine, class T>
void reduce(Warp& warp, const Instruction& i, u32 lanes) {
  const View<T> values(warp, i.operands[2]), to(warp, i.operands[1]);
  T result = values[__builtin_ctz(lanes)];
  for (u32 rest = lanes & (lanes - 1); rest; rest &= rest - 1) result = combine(result, values[__builtin_ctz(rest)]);
  each(lanes, [&](int l) { to.set(l, result); });
}

// Operands: mask, result, predicate, negated; 0 ballot, 1 all, 2 any, 3 uni.
void vote(Warp& warp, const Instruction& i, u32 lanes) {
  const View<bool> values(warp, i.operands[2]);
  u32 ballot = 0;
  each(lanes, [&](int l) { ballot |= u32(values[l] != bool(i.operands[3])) << l; });
  const u32 result = i.operands[4] == 0   ? ballot
                     : i.operands[4] == 1 ? ballot == lanes
                     : i.operands[4] == 2 ? ballot != 0
                                          : ballot == lanes || !ballot;
  each(lanes, [&](int l) { warp.lanes<u32>(i.operands[1])[l] = result; });
}

f32 tf32(u32 bits) {
  return __builtin_bit_cast(f32, bits & 0xffffe000u);
}

// Operands: mask, four of D, four of A, two of B, four of C. Sums are rounded once.
void mma_m16n8k8(Warp& warp, const Instruction& i, u32) {
  f32 a[16][8], b[8][8];
  f64 d[16][8];
  const auto word = [&](int operand, int l) { return warp.lanes<u32>(i.operands[operand])[l]; };
  for (int l = 0; l < kLanes; ++l) {
    const int row = l / 4, column = l % 4;
    for (int k = 0; k < 4; ++k) a[row + k % 2 * 8][column + k / 2 * 4] = tf32(word(5 + k, l));
    for (int k = 0; k < 2; ++k) b[column + 4 * k][row] = tf32(word(9 + k, l));
    for (int k = 0; k < 4; ++k) d[row + k / 2 * 8][2 * column + k % 2] = __builtin_bit_cast(f32, word(11 + k, l));
  }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column)
      for (int k = 0; k < 8; ++k) d[row][column] += f64(a[row][k]) * b[k][column];
  for (int l = 0; l < kLanes; ++l)
    for (int k = 0; k < 4; ++k) View<f32>(warp, i.operands[1 + k]).set(l, f32(d[l / 4 + k / 2 * 8][l % 4 * 2 + k % 2]));
}

// Where the word k of row n of a matrix in shared memory is, K-major as wgmma has it; rows of `swizzle` bytes, whose 16
// bytes change places by the row.
u64 address_of(u64 descriptor, int n, int k) {
  const u64 begin = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
            stride = (descriptor >> 32 & 0x3fff) << 4;
  const int mode = descriptor >> 62, swizzle = mode ? 256 >> mode : 0;   // 0: none, 1 to 3: 128, 64 and 32 bytes
  const int byte = 4 * k;
  if (!mode) return begin + n / 8 * stride + byte / 16 * leading + n % 8 * 16 + byte % 16;
  const u64 address = begin + n / 8 * stride + n % 8 * swizzle + byte;
  return address ^ ((address >> 7 & (swizzle / 16 - 1)) << 4);
}

// A warp's 16 rows of the 64. Operands: mask, half of the columns of D, four of A, the descriptor of B, whether D is
// added. What is asynchronous on a GPU is done when it is issued.
template <int kColumns>
void wgmma_m64k8(Warp& warp, const Instruction& i, u32) {
  constexpr int kDepth = 8, kOfLane = kColumns / 2;
  const s32* const inputs = i.operands + 1 + kOfLane;
  const u64 descriptor = warp.lanes<u64>(inputs[4])[0];
  const bool adds = warp.lanes<u32>(inputs[5])[0];
  f32 a[16][kDepth], b[kDepth][kColumns];
  for (int k = 0; k < kDepth; ++k) {
    u64 addresses[kLanes];
    char* places[kLanes];
    for (int n = 0; n < kColumns; ++n) addresses[n] = address_of(descriptor, n, k);
    access(warp, kEveryLane >> (kLanes - kColumns), Space::kShared, addresses, 4, nullptr, places);
    for (int n = 0; n < kColumns; ++n) {
      u32 word;
      std::memcpy(&word, places[n], 4);
      b[k][n] = tf32(word);
    }
  }
  for (int l = 0; l < kLanes; ++l)
    for (int k = 0; k < 4; ++k) a[l / 4 + k % 2 * 8][l % 4 + k / 2 * 4] = tf32(warp.lanes<u32>(inputs[k])[l]);
  for (int l = 0; l < kLanes; ++l)
    for (int r = 0; r < kOfLane; ++r) {
      const View<f32> d(warp, i.operands[1 + r]);
      const int row = l / 4 + r / 2 % 2 * 8, column = r / 4 * 8 + l % 4 * 2 + r % 2;
      f64 sum = adds ? d[l] : 0;
      for (int k = 0; k < kDepth; ++k) sum += f64(a[row][k]) * b[k][column];
      d.set(l, f32(sum));
    }
}

// Operands: mask, matrices, base, offset, a register for each. Lane 8 q + r has the address of row r of matrix q, and
// lane 4 r + k the word k of that row.
template <bool is_store>
void move_matrices(Warp& warp, const Instruction& i, u32) {
  const int count = i.operands[1];
  const u32 lanes = count == 4 ? kEveryLane : (1u << 8 * count) - 1;
  u64 addresses[kLanes];
  each(lanes, [&](int l) { addresses[l] = u32(warp.lanes<u32>(i.operands[2])[l] + i.operands[3]); });
  const auto words = [&](int l) { return warp.lanes<u32>(i.operands[4 + l / 8]) + l % 8 * 4; };
  char* rows[kLanes];
  const char* values[kLanes];
  each(lanes, [&](int l) { values[l] = reinterpret_cast<const char*>(words(l)); });
  access(warp, lanes, Space::kShared, addresses, 16, is_store ? values : nullptr, rows);
  if (!is_store) each(lanes, [&](int l) { std::memcpy(words(l), rows[l], 16); });
}

void trap(Warp& warp, const Instruction&, u32 lanes) {
  fail("trap", warp.index * kLanes + __builtin_ctz(lanes));
}

void nothing(Warp&, const Instruction&, u32) {}

}   // namespace

std::map<std::string, Operation> other_operations() {
  std::map<std::string, Operation> table;
  table["bar.warp.sync"] = {meet, Kind::kOfWarp, {4}};
  table["shfl"] = {shuffle, Kind::kOfWarp, {4, 4, 0, 4, 4, 4}};
  table["vote"] = {vote, Kind::kOfWarp, {4, 4, 4}};
  table["mma.m16n8k8.tf32"] = {mma_m16n8k8, Kind::kOfWarp, {4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4}};
  const auto widths = [](int columns) {
    std::vector<int> all(columns / 2 + 7, 4);
    all[columns / 2 + 5] = 8;
    return all;
  };
  table["wgmma.m64n16k8.tf32"] = {wgmma_m64k8<16>, Kind::kOfWarp, widths(16)};
  table["wgmma.m64n32k8.tf32"] = {wgmma_m64k8<32>, Kind::kOfWarp, widths(32)};
  table["ldmatrix"] = {move_matrices<false>, Kind::kOfWarp, {4, 0, 4}};
  table["stmatrix"] = {move_matrices<true>, Kind::kOfWarp, {4, 0, 4}};
  const auto put = [&](const char* name, Handler run) {
    table[std::string("redux.") + name] = {run, Kind::kOfWarp, {4, 4, 4}};
  };
  put("add.s32", reduce<[](u32 a, u32 b) { return a + b; }, u32>);
  put("add.u32", reduce<[](u32 a, u32 b) { return a + b; }, u32>);
  put("min.s32", reduce<[](s32 a, s32 b) { return a < b ? a : b; }, s32>);
  put("max.s32", reduce<[](s32 a, s32 b) { return (a > b) ? a : b; }, s32>);
  put("min.u32", reduce<[](u32 a, u32 b) { return a < b ? a : b; }, u32>);
  put("max.u32", reduce<[](u32 a, u32 b) { return (a > b) ? a : b; }, u32>);
  put("and.b32", reduce<[](u32 a, u32 b) { return a & b; }, u32>);
  put("or.b32", reduce<[](u32 a, u32 b) { return a | b; }, u32>);
  put("xor.b32", reduce<[](u32 a, u32 b) { return a ^ b; }, u32>);
  table["predicates"] = {predicates, Kind::kPlain, {0, 4, 4, 0, 4}};
  table["take_apart"] = {take_apart}, table["put_together"] = {put_together};
  table["ld"] = {load}, table["st"] = {store};
  table["bra"] = {nothing, Kind::kBranch}, table["exit"] = {nothing, Kind::kExit};
  table["bar"] = {nothing, Kind::kOfBlock, {4, 4, 0, 4}};
  table["trap"] = {trap}, table["nothing"] = {nothing};
  return table;
}

}   // namespace ptx
