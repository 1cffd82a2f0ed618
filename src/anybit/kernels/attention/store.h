// Writing one token's key and value into its slot, and sealing a page; cpu.h has the layout and the rounding.
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

// Codes of kVec values into the rows that share bytes: the first replaces what was there, the others are put beside it.
ANYBIT_INLINE void merge_codes(std::uint8_t* to, Bytes codes, int shift, std::uint8_t keep) {
  Bytes old;
  std::memcpy(&old, to, kVec);
  const Bytes stored = (old & keep) | codes << shift;
  std::memcpy(to, &stored, kVec);
}

// Key dims are rows: a token owns its bytes, and dims d, d + step, ... share one.
void write_key(const KvShape& shape, std::uint8_t* codes, size_t slot, const float* x, Range range) {
  const size_t dim = shape.head_dim, bits = shape.key_bits, step = dim * bits / 8;
  const float scale = half(range.scale), minimum = half(range.minimum);
  codes += slot;
  for (size_t d = 0; d < dim; d += kVec) {
    const Bytes c = codes_of(x + d, scale, minimum, bits);
    std::uint8_t code[kVec];
    std::memcpy(code, &c, kVec);
    for (size_t i = 0; i < kVec; ++i) {
      std::uint8_t& to = codes[(d + i) % step * kPageTokens];
      to = static_cast<std::uint8_t>((d + i < step ? 0 : to) | code[i] << (d + i) / step * bits);
    }
  }
}

// Slots t, t + step, ... share bytes: the others' bits stay.
void write_value(const KvShape& shape, std::uint8_t* codes, size_t slot, const float* x, Range range) {
  const size_t dim = shape.head_dim, bits = shape.value_bits, step = kPageTokens * bits / 8;
  const auto shift = static_cast<int>(slot / step * bits);
  const auto keep = static_cast<std::uint8_t>(~(((1 << bits) - 1) << shift));
  codes += slot % step * dim;
  const float scale = half(range.scale), minimum = half(range.minimum);
  for (size_t d = 0; d < dim; d += kVec) merge_codes(codes + d, codes_of(x + d, scale, minimum, bits), shift, keep);
}

std::uint8_t* values_of(const KvShape& shape, std::uint8_t* block) { return block + shape.key_bytes(); }
std::uint16_t* ranges_of(const KvShape& shape, std::uint8_t* block) {
  return reinterpret_cast<std::uint16_t*>(values_of(shape, block) + shape.value_bytes());
}

void put_key(const KvShape& shape, std::uint8_t* block, size_t slot, const float* key) {
  const size_t dim = shape.head_dim;
  if (shape.key_bits == 16) {
    for (size_t d = 0; d < dim; ++d) reinterpret_cast<std::uint16_t*>(block)[d * kPageTokens + slot] = to_half(key[d]);
    return;
  }
  const Range range = range_of(key, dim, shape.key_bits);
  std::uint16_t* ranges = ranges_of(shape, block) + slot;
  ranges[0] = range.scale, ranges[kPageTokens] = range.minimum;
  write_key(shape, block, slot, key, range);
}

void put_value(const KvShape& shape, std::uint8_t* block, size_t slot, const float* value) {
  const size_t dim = shape.head_dim;
  if (shape.value_bits == 16) {
    auto* to = reinterpret_cast<std::uint16_t*>(values_of(shape, block)) + slot * dim;
    for (size_t d = 0; d < dim; ++d) to[d] = to_half(value[d]);
    return;
  }
  const Range range = range_of(value, dim, shape.value_bits);
  std::uint16_t* ranges = ranges_of(shape, block) + shape.key_range_bytes() / 2 + slot;
  ranges[0] = range.scale, ranges[kPageTokens] = range.minimum;
  write_value(shape, values_of(shape, block), slot, value, range);
}

void write_head(const KvShape& shape, std::uint8_t* block, size_t slot, const float* key, const float* value) {
  put_key(shape, block, slot, key);
  put_value(shape, block, slot, value);
}

// Channel by channel: 64 tokens of one are a row of the open page.
void seal_channels(const KvShape& shape, const std::uint16_t* keys, std::uint8_t* block) {
  const size_t dim = shape.head_dim, bits = shape.key_bits, step = dim * bits / 8;
  std::uint16_t* ranges = ranges_of(shape, block);
  for (size_t d = 0; d < dim; ++d) {
    float x[kPageTokens];
    halves(keys + d * kPageTokens, x, kPageTokens);
    const Range range = range_of(x, kPageTokens, bits);
    ranges[d] = range.scale, ranges[dim + d] = range.minimum;
    const auto keep = static_cast<std::uint8_t>(d < step ? 0 : 0xFF);
    for (size_t t = 0; t < kPageTokens; t += kVec)
      merge_codes(block + d % step * kPageTokens + t, codes_of(x + t, half(range.scale), half(range.minimum), bits),
                  static_cast<int>(d / step * bits), keep);
  }
}

void seal_head(const KvShape& shape, const std::uint8_t* open, std::uint8_t* sealed) {
  constexpr size_t kMost = 512;
  const size_t dim = shape.head_dim;
  const auto* keys = reinterpret_cast<const std::uint16_t*>(open);
  const std::uint16_t* values = keys + dim * kPageTokens;
  float x[kMost];
  if (shape.channels) seal_channels(shape, keys, sealed);
  for (size_t slot = 0; slot < kPageTokens; ++slot) {
    if (!shape.channels) {
      for (size_t d = 0; d < dim; ++d) x[d] = half(keys[d * kPageTokens + slot]);
      put_key(shape, sealed, slot, x);
    }
    halves(values + slot * dim, x, dim);
    put_value(shape, sealed, slot, x);
  }
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
