// Plane bits of a stretch of columns to byte codes; shared by every kernel that wants codes.
#pragma once

#include "planes.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {

// Codes of columns [k, k + count) of row n, k a multiple of kCodes and count <= kCodes. A short stretch reads only the bytes
// that exist; what their padding bits say lands beyond `count` and is dropped.
ANYBIT_INLINE void expand_columns(const Planes& p, size_t n, size_t k, size_t count, std::uint8_t* codes) {
  alignas(64) std::uint8_t out[kCodes] = {};
  if (count == kCodes) {
    for (size_t i = 0; i < p.bits; ++i) expand(p.row(i, n) + k / 8, out, 1u << (p.bits - 1 - i));
    std::memcpy(codes, out, kCodes);
    return;
  }
  for (size_t i = 0; i < p.bits; ++i) {
    std::uint8_t bits[kCodes / 8] = {};
    std::memcpy(bits, p.row(i, n) + k / 8, (count + 7) / 8);
    expand(bits, out, 1u << (p.bits - 1 - i));
  }
  std::memcpy(codes, out, count);
}

}  // namespace anybit::ANYBIT_TARGET
