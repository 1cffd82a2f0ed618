// What both quantizers of a row share.
#pragma once

#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
constexpr float kRound = 12582912.0f;
constexpr std::int32_t kRoundBits = 0x4B400000;
constexpr std::int32_t kInfinite = 0x7F800000;     // the bits of an infinity; those of a NaN are above
constexpr std::int32_t kNothing = (127 - 100) << 23;  // 2^-100: smaller groups count as zero, so 127 / amax cannot overflow

using Bytes = VectorOf<std::int8_t, kWidth>::type;

// As integers, the bits of |x| are ordered like |x|, infinities and NaN last.
ANYBIT_INLINE Ints magnitude(Vec v) { return bits_of(v) & 0x7FFFFFFF; }

ANYBIT_INLINE std::int32_t largest_magnitude(const float* x, size_t count) {
  Ints most = {}, other = {};
  size_t k = 0;
  for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
    const Ints a = magnitude(load(x + k)), b = magnitude(load(x + k + kWidth));
    most = most > a ? most : a, other = other > b ? other : b;
  }
  for (; k < count; k += kWidth) {
    const Ints a = magnitude(count - k < kWidth ? load_some(x + k, count - k) : load(x + k));
    most = most > a ? most : a;
  }
  return largest_of(most > other ? most : other);
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
