// Writing one token's key and value into its slot; cpu.h has the layout and the rounding.
#pragma once

#include "cpu.h"
#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

// Nearest float16, ties to even, saturated; NaN stays NaN. Below 2^-14 the sum with 0.5 rounds at float16's subnormal spacing.
ANYBIT_INLINE std::uint16_t to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  const auto small = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000;
  const auto normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  const auto large = magnitude > 0x7F800000 ? 0x7E00u : 0x7BFFu;
  const auto rounded = magnitude < 0x38800000 ? small : magnitude < 0x477FF000 ? normal : large;
  return static_cast<std::uint16_t>(sign | rounded);
}

// The largest float16 <= x, and the smallest >= x for x >= 0; saturated.
ANYBIT_INLINE std::uint16_t half_below(float x) {
  const std::uint16_t h = to_half(x);
  if (!(half(h) > x) || h == 0xFBFF) return h;
  return static_cast<std::uint16_t>(h & 0x8000 ? h + 1 : h ? h - 1 : 0x8001);
}
ANYBIT_INLINE std::uint16_t half_above(float x) {
  const std::uint16_t h = to_half(x);
  return static_cast<std::uint16_t>(half(h) < x && h != 0x7BFF ? h + 1 : h);
}

struct Range {
  std::uint16_t scale, minimum;
};

ANYBIT_INLINE Range range_of(const float* x, size_t dim, size_t bits) {
  Vec low = load(x), high = -low;  // both are minima: of x and of -x
  for (size_t d = kVec; d < dim; d += kVec) {
    const Vec v = load(x + d);
    low = v < low ? v : low;
    high = -v < high ? -v : high;
  }
  const std::uint16_t minimum = half_below(-largest(-low));
  return {half_above((largest(-high) - half(minimum)) / static_cast<float>((1 << bits) - 1)), minimum};
}

typedef std::uint8_t Bytes __attribute__((vector_size(kVec)));

// Codes of kVec values; the magic number rounds to the nearest integer and leaves it in the low bits.
ANYBIT_INLINE Bytes codes_of(const float* x, float scale, float minimum, size_t bits) {
  const Vec top = all(static_cast<float>((1 << bits) - 1)), exact = (load(x) - minimum) / scale;
  const Vec positive = exact > Vec{} ? exact : Vec{};  // NaN too, from 0 / 0: a constant vector has scale 0 and codes 0
  return __builtin_convertvector((Ints)((positive < top ? positive : top) + 0x1.8p23f) & 255, Bytes);
}

// Key dims are rows: dims d and d + dim / 2 share a byte at 4 bits, so a token owns its bytes.
void write_key(const KvShape& shape, std::uint8_t* codes, size_t slot, const float* x, Range range) {
  const size_t dim = shape.head_dim, low = shape.bits == 4 ? dim / 2 : dim;
  const float scale = half(range.scale), minimum = half(range.minimum);
  codes += slot;
  for (size_t d = 0; d < dim; d += kVec) {
    const Bytes c = codes_of(x + d, scale, minimum, shape.bits);
    std::uint8_t code[kVec];
    std::memcpy(code, &c, kVec);
    const size_t below = d >= low ? 0 : low - d < kVec ? low - d : kVec;
    for (size_t i = 0; i < below; ++i) codes[(d + i) * kPageTokens] = code[i];
    for (size_t i = below; i < kVec; ++i) codes[(d + i - low) * kPageTokens] |= static_cast<std::uint8_t>(code[i] << 4);
  }
}

// Slots t and t + 32 share bytes at 4 bits: the other's nibbles stay.
void write_value(const KvShape& shape, std::uint8_t* codes, size_t slot, const float* x, Range range) {
  constexpr size_t kHalf = kPageTokens / 2;
  const size_t dim = shape.head_dim;
  const bool nibbles = shape.bits == 4;
  const int shift = nibbles && slot >= kHalf ? 4 : 0;
  const auto keep = static_cast<std::uint8_t>(nibbles ? 0xF0 >> shift : 0);
  codes += (nibbles ? slot % kHalf : slot) * dim;
  const float scale = half(range.scale), minimum = half(range.minimum);
  for (size_t d = 0; d < dim; d += kVec) {
    Bytes old;
    std::memcpy(&old, codes + d, kVec);
    const Bytes stored = (old & keep) | codes_of(x + d, scale, minimum, shape.bits) << shift;
    std::memcpy(codes + d, &stored, kVec);
  }
}

void write_head(const KvShape& shape, std::uint8_t* block, size_t slot, const float* key, const float* value) {
  const size_t dim = shape.head_dim;
  std::uint8_t* values = block + shape.code_bytes();
  if (shape.bits == 16) {
    auto* keys16 = reinterpret_cast<std::uint16_t*>(block);
    auto* values16 = reinterpret_cast<std::uint16_t*>(values) + slot * dim;
    for (size_t d = 0; d < dim; ++d) keys16[d * kPageTokens + slot] = to_half(key[d]);
    for (size_t d = 0; d < dim; ++d) values16[d] = to_half(value[d]);
    return;
  }
  auto* stored = reinterpret_cast<std::uint16_t*>(values + shape.code_bytes()) + slot;
  const Range key_range = range_of(key, dim, shape.bits), value_range = range_of(value, dim, shape.bits);
  const std::uint16_t row[4] = {key_range.scale, key_range.minimum, value_range.scale, value_range.minimum};
  for (size_t i = 0; i < 4; ++i) stored[i * kPageTokens] = row[i];
  write_key(shape, block, slot, key, key_range);
  write_value(shape, values, slot, value, value_range);
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
