// The opcodes of PTX, by their names without what changes nothing here; tests/ptx.py brings them to this form.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

#include "approximations.h"
#include "ptx_machine.h"

namespace ptx {
namespace {

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

template <auto function, class To, class... From>
void elementwise(Warp& warp, const Instruction& i, u32 lanes) {
  [&]<size_t... k>(std::index_sequence<k...>) {
    const View<To> to(warp, i.operands[0]);
    const std::tuple<View<From>...> from{View<From>(warp, i.operands[k + 1])...};
    each(lanes, [&](int l) { to.set(l, To(function(std::get<k>(from)[l]...))); });
  }(std::index_sequence_for<From...>());
}

std::map<std::string, Operation> table;

template <auto function, class To, class... From>
void add(const std::string& name) {
  table[name] = {elementwise<function, To, From...>, Kind::kPlain, {kWidth<To>, kWidth<From>...}};
}

template <class T>
T flushed(T x) {
  return std::fabs(x) < std::numeric_limits<T>::min() ? std::copysign(T(0), x) : x;
}

// The other operand where one is NaN; of zeros the one with the sign that counts.
template <class T>
T smaller(T a, T b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return -smaller(-a, -b);
}

template <class T>
void add_float(const std::string& t) {
  add<[](T a, T b) { return a + b; }, T, T, T>("add." + t);
  add<[](T a, T b) { return a - b; }, T, T, T>("sub." + t);
  add<[](T a, T b) { return a * b; }, T, T, T>("mul." + t);
  add<[](T a, T b) { return a / b; }, T, T, T>("div." + t);
  add<[](T a, T b, T c) { return std::fma(a, b, c); }, T, T, T, T>("fma." + t);
  add<[](T a) { return -a; }, T, T>("neg." + t);
  add<[](T a) { return std::fabs(a); }, T, T>("abs." + t);
  add<[](T a) { return T(1) / a; }, T, T>("rcp." + t);
  add<[](T a) { return std::sqrt(a); }, T, T>("sqrt." + t);
  add<smaller<T>, T, T, T>("min." + t);
  add<larger<T>, T, T, T>("max." + t);
  add<[](T a, T b) { return a != a || b != b ? T(NAN) : smaller(a, b); }, T, T, T>("min.NaN." + t);
  add<[](T a, T b) { return a != a || b != b ? T(NAN) : larger(a, b); }, T, T, T>("max.NaN." + t);
  add<[](T a, T b) { return std::copysign(b, a); }, T, T, T>("copysign." + t);
}

// The same with numbers below the normal ones taken and given as zeros.
void add_flushing() {
  add<[](f32 a, f32 b) { return flushed(flushed(a) + flushed(b)); }, f32, f32, f32>("add.ftz.f32");
  add<[](f32 a, f32 b) { return flushed(flushed(a) - flushed(b)); }, f32, f32, f32>("sub.ftz.f32");
  add<[](f32 a, f32 b) { return flushed(flushed(a) * flushed(b)); }, f32, f32, f32>("mul.ftz.f32");
  add<[](f32 a, f32 b, f32 c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }, f32, f32, f32, f32>(
      "fma.ftz.f32");
  add<[](f32 a) { return -flushed(a); }, f32, f32>("neg.ftz.f32");
  add<[](f32 a) { return std::fabs(flushed(a)); }, f32, f32>("abs.ftz.f32");
}

// Rounded down.
f32 fma_down(f32 a, f32 b, f32 c) {
  const long double exact = (long double)(a)*b + c;
  const f32 nearest = f32(exact);
  return nearest > exact ? std::nextafter(nearest, -INFINITY) : nearest;
}

void add_approximations() {
  static constexpr auto exact = [] { return machine().exact; };
  add<[](f32 a) { return exact() ? 1 / flushed(a) : flushed(approximations::reciprocal(flushed(a))); }, f32, f32>(
      "rcp.approx.ftz.f32");
  add<[](f32 a) { return exact() ? f32(std::log2(f64(flushed(a)))) : approximations::log2(flushed(a)); }, f32, f32>(
      "lg2.approx.ftz.f32");
  add<[](f32 a) { return exact() ? flushed(f32(std::exp2(f64(flushed(a))))) : approximations::exp2(flushed(a)); }, f32,
      f32>("ex2.approx.ftz.f32");
  add<fma_down, f32, f32, f32, f32>("fma.rm.f32");
  add<[](f32 a) { return f32(std::log2(f64(a))); }, f32, f32>("lg2.approx.f32");
  add<[](f32 a) { return f32(std::exp2(f64(a))); }, f32, f32>("ex2.approx.f32");
  add<[](f32 a, f32 b) {
    const f64 y = f64(a) / b;
    return exact() || !std::isfinite(y) || y == 0 ? f32(y) : approximations::perturbed(y, std::fabs(y) * 0x1p-22, a);
  },
      f32, f32, f32>("div.full.f32");
  table["div.full.ftz.f32"] = table["div.full.f32"];
  // The upper 32 bits of the argument and of the result.
  add<[](f64 a) {
    const auto upper = [](f64 x) {
      return __builtin_bit_cast(f64, __builtin_bit_cast(u64, x) & 0xffffffff00000000ull);
    };
    return upper(flushed(1 / flushed(upper(a))));
  },
      f64, f64>("rcp.approx.ftz.f64");
}

template <class T>
T checked(T a, T b, T quotient_or_rest(T, T)) {
  if (b == 0) fail("division by zero");
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return quotient_or_rest(T(-1), T(1)) == 0 ? T(0) : T(0 - std::make_unsigned_t<T>(a));
  return quotient_or_rest(a, b);
}

template <class T>
void add_integer(const std::string& t) {
  using U = std::make_unsigned_t<T>;
  add<[](U a, U b) { return U(a + b); }, U, U, U>("add." + t);
  add<[](U a, U b) { return U(a - b); }, U, U, U>("sub." + t);
  add<[](U a, U b) { return U(u64(a) * u64(b)); }, U, U, U>("mul.lo." + t);
  add<[](U a, U b, U c) { return U(u64(a) * u64(b) + c); }, U, U, U, U>("mad.lo." + t);
  add<[](T a, T b) { return checked<T>(a, b, [](T x, T y) { return T(x / y); }); }, T, T, T>("div." + t);
  add<[](T a, T b) { return checked<T>(a, b, [](T x, T y) { return T(x % y); }); }, T, T, T>("rem." + t);
  add<[](T a, T b) { return a < b ? a : b; }, T, T, T>("min." + t);
  add<[](T a, T b) { return (a > b) ? a : b; }, T, T, T>("max." + t);
  add<[](U a) { return U(0 - a); }, U, U>("neg." + t);
  add<[](T a) { return a < 0 ? T(0 - U(a)) : a; }, T, T>("abs." + t);
  add<[](T a, u32 n) { return n >= 8 * sizeof(T) ? T(a < 0 ? -1 : 0) : T((a >> n)); }, T, T, u32>("shr." + t);
}

template <class U>
void add_bits(const std::string& bits) {
  add<[](U a, U b) { return U(a & b); }, U, U, U>("and.b" + bits);
  add<[](U a, U b) { return U(a | b); }, U, U, U>("or.b" + bits);
  add<[](U a, U b) { return U(a ^ b); }, U, U, U>("xor.b" + bits);
  add<[](U a) { return U(~a); }, U, U>("not.b" + bits);
  add<[](U a, u32 n) { return n >= 8 * sizeof(U) ? U(0) : U(a << n); }, U, U, u32>("shl.b" + bits);
  add<[](U a) { return a; }, U, U>("mov.b" + bits);
  add<[](U a, U b, bool first) { return first ? a : b; }, U, U, U, bool>("selp.b" + bits);
}

// (u32 or u64 alone) what counts bits or takes a product apart.
void add_other_integers() {
  add<[](u32 a) { return __builtin_popcount(a); }, u32, u32>("popc.b32");
  add<[](u64 a) { return __builtin_popcountll(a); }, u32, u64>("popc.b64");
  add<[](u32 a) { return a ? __builtin_clz(a) : 32; }, u32, u32>("clz.b32");
  add<[](u64 a) { return a ? __builtin_clzll(a) : 64; }, u32, u64>("clz.b64");
  add<[](u32 a) {
    u32 r = 0;
    for (int k = 0; k < 32; ++k) r |= (a >> k & 1) << (31 - k);
    return r;
  },
      u32, u32>("brev.b32");
  add<[](u16 a, u16 b) { return u32(a) * b; }, u32, u16, u16>("mul.wide.u16");
  add<[](s16 a, s16 b) { return s32(a) * b; }, s32, s16, s16>("mul.wide.s16");
  add<[](u32 a, u32 b) { return u64(a) * b; }, u64, u32, u32>("mul.wide.u32");
  add<[](s32 a, s32 b) { return s64(a) * b; }, s64, s32, s32>("mul.wide.s32");
  add<[](u32 a, u32 b, u64 c) { return u64(a) * b + c; }, u64, u32, u32, u64>("mad.wide.u32");
  add<[](s32 a, s32 b, s64 c) { return s64(u64(s64(a) * b) + u64(c)); }, s64, s32, s32, s64>("mad.wide.s32");
  add<[](u32 a, u32 b) { return u32((u64(a) * b >> 32)); }, u32, u32, u32>("mul.hi.u32");
  add<[](s32 a, s32 b) { return s32((s64(a) * b >> 32)); }, s32, s32, s32>("mul.hi.s32");
  add<[](u64 a, u64 b) { return u64(((unsigned __int128)a * b >> 64)); }, u64, u64, u64>("mul.hi.u64");
  add<[](s64 a, s64 b) { return s64(((__int128)a * b >> 64)); }, s64, s64, s64>("mul.hi.s64");
  add<[](u32 a, u32 b, u32 c, u32 d) {
    const u32 begin = c & 255, count = d & 255;
    if ((begin > 31) || !count) return b;
    const u32 mask = ((count >= 32) ? ~0u : (1u << count) - 1) << begin;
    return (b & ~mask) | (a << begin & mask);
  },
      u32, u32, u32, u32, u32>("bfi.b32");
  add<[](u32 a, u32 c, u32 d) {
    const u32 begin = c & 255, count = d & 255;
    if ((begin > 31) || !count) return 0u;
    return ((a >> begin) & ((count >= 32) ? ~0u : (1u << count) - 1));
  },
      u32, u32, u32, u32>("bfe.u32");
  add<[](s32 a, u32 c, u32 d) {
    const u32 begin = std::min<u32>(c & 255, 32), count = d & 255;
    if (!count) return 0;
    const u32 end = std::min<u32>(begin + count, 32);
    return s32((begin > 31 ? a >> 31 : s32(u32(a) << (32 - end)) >> (32 - end + begin)));
  },
      s32, s32, u32, u32>("bfe.s32");
  add<[](u32 a, u32 b, u32 selectors) {
    const u64 both = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 selector = (selectors >> 4 * k & 15), byte = (both >> 8 * (selector & 7) & 255);
      result |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * k;
    }
    return result;
  },
      u32, u32, u32, u32>("prmt.b32");
  add<[](u32 a, u32 b, u32 c, u32 truth) {
    u32 result = 0;
    for (int k = 0; k < 8; ++k)
      if ((truth >> k & 1)) result |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return result;
  },
      u32, u32, u32, u32, u32>("lop3.b32");
  add<[](u32 a, u32 b, u32 n) { return u32(((u64(b) << 32 | a) << (n & 31) >> 32)); }, u32, u32, u32, u32>(
      "shf.l.wrap.b32");
  add<[](u32 a, u32 b, u32 n) { return u32(((u64(b) << 32 | a) >> (n & 31))); }, u32, u32, u32, u32>("shf.r.wrap.b32");
}

// Operands: result, its opposite or -1, two numbers, a predicate to combine with, how (0: not), whether it is negated.
template <auto compare, class T>
void set_predicate(Warp& warp, const Instruction& i, u32 lanes) {
  const View<bool> to(warp, i.operands[0]), other(warp, i.operands[4]);
  const View<T> a(warp, i.operands[2]), b(warp, i.operands[3]);
  const int how = i.operands[5];
  const bool negated = i.operands[6];
  each(lanes, [&](int l) {
    const bool holds = compare(a[l], b[l]), with = other[l] != negated;
    const auto combined = [&](bool x) {
      return how == 1 ? x && with : how == 2 ? x || with : how == 3 ? x != with : x;
    };
    if (i.operands[1] >= 0) View<bool>(warp, i.operands[1]).set(l, combined(!holds));
    to.set(l, combined(holds));
  });
}

template <class T>
void add_comparisons(const std::string& t) {
  const auto put = [&](const char* name, Handler run) {
    table[std::string("setp.") + name + "." + t] = {run, Kind::kPlain, {4, 0, kWidth<T>, kWidth<T>, 4}};
  };
  put("eq", set_predicate<[](T a, T b) { return a == b; }, T>);
  put("lt", set_predicate<[](T a, T b) { return a < b; }, T>);
  put("le", set_predicate<[](T a, T b) { return a <= b; }, T>);
  put("gt", set_predicate<[](T a, T b) { return (a > b); }, T>);
  put("ge", set_predicate<[](T a, T b) { return (a >= b); }, T>);
  if constexpr (std::is_floating_point_v<T>) {
    put("ne", set_predicate<[](T a, T b) { return a < b || (a > b); }, T>);
    put("equ", set_predicate<[](T a, T b) { return !(a < b || (a > b)); }, T>);
    put("neu", set_predicate<[](T a, T b) { return !(a == b); }, T>);
    put("ltu", set_predicate<[](T a, T b) { return !(a >= b); }, T>);
    put("leu", set_predicate<[](T a, T b) { return !(a > b); }, T>);
    put("gtu", set_predicate<[](T a, T b) { return !(a <= b); }, T>);
    put("geu", set_predicate<[](T a, T b) { return !(a < b); }, T>);
    put("num", set_predicate<[](T a, T b) { return a == a && b == b; }, T>);
    put("nan", set_predicate<[](T a, T b) { return a != a || b != b; }, T>);
  } else {
    put("ne", set_predicate<[](T a, T b) { return a != b; }, T>);
  }
}

template <class To, class From>
To converted(From x, int rounding) {
  // 0: to nearest, 1 to 4: to an integer, nearest, towards 0, down, up; 5: into 0 to 1; 8 more: flushed
  if constexpr (std::is_floating_point_v<From>) {
    if (rounding & 8) return converted<To>(flushed(x), rounding - 8);
    const From y = rounding == 1   ? std::nearbyint(x)
                   : rounding == 2 ? std::trunc(x)
                   : rounding == 3 ? std::floor(x)
                   : rounding == 4 ? std::ceil(x)
                                   : x;
    if constexpr (std::is_floating_point_v<To>) {
      return rounding == 5 ? (x > 0 ? std::min(To(x), To(1)) : To(0)) : To(y);
    } else {
      if (y != y) return 0;
      if (y <= From(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
      if (y >= From(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
      return To(y);
    }
  } else {
    return To(x);
  }
}

// Operands: result, number, rounding, bytes of the registers of both, which may be wider than an integer.
template <class To, class From>
void convert(Warp& warp, const Instruction& i, u32 lanes) {
  const int rounding = i.operands[2];
  const bool narrow = sizeof(From) < 8 && i.operands[4] == 8;
  const View<From> from(warp, i.operands[1]);
  const View<u64> wide(warp, i.operands[1]);
  const auto number = [&](int l) { return narrow ? From(wide[l]) : from[l]; };
  if (sizeof(To) < 8 && i.operands[3] == 8) {   // its sign goes on
    u64* const to = warp.lanes<u64>(i.operands[0]);
    each(lanes, [&](int l) { to[l] = u64(s64(converted<To>(number(l), rounding))); });
  } else {
    const View<To> to(warp, i.operands[0]);
    each(lanes, [&](int l) { to.set(l, converted<To>(number(l), rounding)); });
  }
}

constexpr std::tuple<std::pair<const char*, u8>, std::pair<const char*, s8>, std::pair<const char*, u16>,
                     std::pair<const char*, s16>, std::pair<const char*, u32>, std::pair<const char*, s32>,
                     std::pair<const char*, u64>, std::pair<const char*, s64>, std::pair<const char*, f32>,
                     std::pair<const char*, f64>>
    kTypes{{"u8", 0},  {"s8", 0},  {"u16", 0}, {"s16", 0}, {"u32", 0},
           {"s32", 0}, {"u64", 0}, {"s64", 0}, {"f32", 0}, {"f64", 0}};

void for_each_type(const auto& body) {
  std::apply([&](auto... type) { (body(type.first, type.second), ...); }, kTypes);
}

void add_conversions() {
  for_each_type([](const char* to, auto a) {
    for_each_type([&](const char* from, auto b) {
      table[std::string("cvt.") + to + "." + from] = {convert<decltype(a), decltype(b)>};
    });
  });
}

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

void add_warp_operations() {
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
  const auto put = [](const char* name, Handler run) {
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
}

void trap(Warp& warp, const Instruction&, u32 lanes) {
  fail("trap", warp.index * kLanes + __builtin_ctz(lanes));
}

void nothing(Warp&, const Instruction&, u32) {}

}   // namespace

const std::map<std::string, Operation>& operations() {
  if (!table.empty()) return table;
  add_float<f32>("f32"), add_float<f64>("f64"), add_flushing();
  add_approximations();
  add_integer<s16>("s16"), add_integer<s32>("s32"), add_integer<s64>("s64");
  add_integer<u16>("u16"), add_integer<u32>("u32"), add_integer<u64>("u64");
  add_bits<u16>("16"), add_bits<u32>("32"), add_bits<u64>("64");
  add_other_integers();
  for_each_type([](const char* name, auto type) {
    if constexpr (sizeof(type) > 1) add_comparisons<decltype(type)>(name);
  });
  add_conversions();
  add_warp_operations();
  table["predicates"] = {predicates, Kind::kPlain, {0, 4, 4, 0, 4}};
  table["take_apart"] = {take_apart}, table["put_together"] = {put_together};
  table["ld"] = {load}, table["st"] = {store};
  table["bra"] = {nothing, Kind::kBranch}, table["exit"] = {nothing, Kind::kExit};
  table["bar"] = {nothing, Kind::kOfBlock, {4, 4, 0, 4}};
  table["trap"] = {trap}, table["nothing"] = {nothing};
  return table;
}

}   // namespace ptx
