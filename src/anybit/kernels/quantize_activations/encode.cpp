// Rows to codes of any scheme; the reference is formats/activation.py, whose float operations are done here in the same order.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu.h"
#include "rounding.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Range {
  float low, high;
};
struct Steps {
  float scale, factor, offset;
};

ANYBIT_INLINE Range range_of(const float* x, size_t count) {
  Vec low = all(x[0]), high = low;
  size_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    const Vec v = load(x + k);
    low = v < low ? v : low, high = v > high ? v : high;
  }
  for (; k < count; ++k) {
    const Vec v = all(x[k]);
    low = v < low ? v : low, high = v > high ? v : high;
  }
  return {fold<float, kWidth>(low, [](auto a, auto b) { return a < b ? a : b; }),
          fold<float, kWidth>(high, [](auto a, auto b) { return a > b ? a : b; })};
}

// `levels` steps over `span`: none below 2^-100.
ANYBIT_INLINE Steps steps(float span, float levels) {
  if (!std::isfinite(span)) return {kNaN, 0.0f, 0.0f};
  if (span < 0x1p-100f) return {0.0f, 0.0f, 0.0f};
  return {span / levels, levels / span, 0.0f};
}

Steps steps_of(const float* x, const Scheme& s, size_t group, size_t count) {
  const auto top = static_cast<float>(1 << (s.bits - 1));
  const std::int32_t bits = largest_magnitude(x, count);
  const bool finite = bits < kInfinite;
  if (s.scale)
    return {finite ? s.scale[group] : kNaN, finite ? 1.0f / s.scale[group] : 0.0f, s.offset ? s.offset[group] : 0.0f};
  float reach;
  std::memcpy(&reach, &bits, sizeof reach);
  if (s.symmetric) return steps(reach * s.clip, top - 1);
  if (!finite) return {kNaN, 0.0f, kNaN};
  Range range = range_of(x, count);
  range.low *= s.clip, range.high *= s.clip;
  if (s.rounded_zero) range.low = range.low > 0 ? 0.0f : range.low, range.high = range.high < 0 ? 0.0f : range.high;
  Steps found = steps(range.high - range.low, 2 * top - 1);
  found.offset = range.low + top * found.scale;
  if (s.rounded_zero && found.scale > 0) found.offset = std::nearbyint(found.offset * found.factor) * found.scale;
  return found;
}

// Codes of up to one group of `out` and their sum.
ANYBIT_INLINE std::int32_t round_codes(const float* x, const Steps& by, float low, float high, size_t count, std::int8_t* codes) {
  Ints sum = {};
  for (size_t k = 0; k < count; k += kWidth) {
    const size_t n = count - k < kWidth ? count - k : kWidth;
    Vec v = ((n < kWidth ? load_some(x + k, n) : load(x + k)) - by.offset) * by.factor;
    v = v == v ? v : all(0.0f);
    v = v > high ? all(high) : v, v = v < low ? all(low) : v;
    const Ints code = bits_of(v + kRound) - kRoundBits;
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(codes + k, &bytes, n);
    if (n == kWidth)
      sum += code;
    else
      for (size_t i = 0; i < n; ++i) sum[0] += codes[k + i];
  }
  return sum_of(sum);
}

// Columns that bypass take a value that is in the range of the others: 0, or without symmetry the group's first.
const float* without(const float* x, const Scheme& s, size_t columns) {
  static thread_local std::vector<float> memory;
  if (memory.size() < columns) memory.resize(columns);
  std::memcpy(memory.data(), x, columns * sizeof *x);
  for (size_t i = 0; i < s.bypassed;) {
    const size_t begin = s.bypass[i] / s.group_size * s.group_size;
    const size_t end = columns - begin < s.group_size ? columns : begin + s.group_size;
    size_t stop = i, free = begin;
    for (; stop < s.bypassed && s.bypass[stop] < end; ++stop) free += s.bypass[stop] == free;
    const float neutral = s.symmetric || free == end ? 0.0f : x[free];
    for (; i < stop; ++i) memory[s.bypass[i]] = neutral;
  }
  return memory.data();
}

void encode(const float* row, const Scheme& s, const Activations& out, float* side, size_t token) {
  const float* x = s.bypassed ? without(row, s, out.columns) : row;
  const float top = static_cast<float>(1 << (s.bits - 1)), low = s.symmetric ? 1 - top : -top;
  std::int8_t* codes = out.codes + token * out.stride;
  float *scale = out.scale + token * out.groups, *sums = out.sums + token * out.groups;
  for (size_t begin = 0, g = 0, end; begin < out.columns; begin = end, ++g) {
    end = out.columns - begin < s.group_size ? out.columns : begin + s.group_size;
    const Steps by = steps_of(x + begin, s, g, end - begin);
    if (!s.symmetric) *side++ = by.offset;
    for (size_t k = begin; k < end; k += out.group_size, ++scale, ++sums) {
      const size_t count = end - k < out.group_size ? end - k : out.group_size;
      *scale = by.scale, *sums = static_cast<float>(round_codes(x + k, by, low, top - 1, count, codes + k));
    }
  }
  for (size_t i = 0; i < s.bypassed; ++i) {
    const size_t k = s.bypass[i];
    out.sums[token * out.groups + k / out.group_size] -= static_cast<float>(codes[k]);
    codes[k] = 0, *side++ = row[k];
  }
  std::memset(codes + out.columns, 0, out.stride - out.columns);
}

}  // namespace

extern const EncodeTable encode_table = {encode};

}  // namespace anybit::ANYBIT_TARGET
