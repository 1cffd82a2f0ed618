// Portable primitives, also the definition of what the vector ones do. Eight bytes at a time inside one 64-bit register.
#pragma once

namespace anybit::ANYBIT_TARGET {

constexpr size_t kCodes = 8;
constexpr size_t kLanes = 1;
using Words = std::uint32_t;
using Floats = float;

constexpr std::uint64_t kOnes = 0x0101010101010101u;

ANYBIT_INLINE void expand(const std::uint8_t* bits, std::uint8_t* codes, unsigned weight) {
  std::uint64_t sum;
  std::memcpy(&sum, codes, 8);
  const std::uint64_t picked = (*bits * kOnes) & 0x8040201008040201u;        // byte i keeps bit i only
  const std::uint64_t ones = ((picked + 0x7F7F7F7F7F7F7F7Fu) >> 7) & kOnes;  // and becomes 0 or 1
  sum |= ones * weight;
  std::memcpy(codes, &sum, 8);
}

ANYBIT_INLINE void collapse(const std::uint8_t* codes, unsigned weight, std::uint8_t* bits) {
  std::uint64_t word;
  std::memcpy(&word, codes, 8);
  const std::uint64_t ones = (word >> std::countr_zero(weight)) & kOnes;
  *bits = static_cast<std::uint8_t>((ones * 0x0102040810204080u) >> 56);  // the product gathers byte i at bit 56 + i
}

ANYBIT_INLINE Words load_words(const std::uint8_t* p, size_t) {
  Words word;
  std::memcpy(&word, p, 4);
  return word;
}
ANYBIT_INLINE Floats load_strided(const float* p, size_t) { return *p; }
ANYBIT_INLINE Floats lookup(const float* table, Words w) { return table[w & 15]; }
ANYBIT_INLINE Words shift4(Words w) { return w >> 4; }
ANYBIT_INLINE Floats broadcast(float v) { return v; }
ANYBIT_INLINE Floats add(Floats a, Floats b) { return a + b; }
ANYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return __builtin_fmaf(a, b, c); }
ANYBIT_INLINE void store(float* y, Floats v, size_t) { *y = v; }

// float16 to float32, exact, subnormals included: the mantissa is rescaled by a power of two instead of being normalised.
ANYBIT_INLINE float half(std::uint16_t h) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(h & 0x7FFF) << 13;
  const std::uint32_t special = (h & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16;
  return std::bit_cast<float>((special ? special | (magnitude & 0x7FFFFF) : std::bit_cast<std::uint32_t>(value)) | sign);
}
ANYBIT_INLINE void halves(const std::uint16_t* h, float* f, size_t n) {
  for (size_t i = 0; i < n; ++i) f[i] = half(h[i]);
}

}  // namespace anybit::ANYBIT_TARGET
