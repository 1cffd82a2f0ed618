// Codes uint8 [N, K] <-> planes [b, N, ceil(K/8)], one row at a time; the reference is anybit/formats/planes.py.
//
// v1: expand / collapse kCodes columns per step over every plane. Numbers: NOTES.md.
#include "cpu.h"

#include "expand.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

// Collapses `count` <= kCodes columns of one plane; a short tail goes through a zero-padded copy, so padding bits come out 0.
ANYBIT_INLINE void collapse_some(const std::uint8_t* codes, size_t count, unsigned weight, std::uint8_t* bits) {
  if (count == kCodes) return collapse(codes, weight, bits);
  alignas(64) std::uint8_t padded[kCodes] = {};
  std::uint8_t out[kCodes / 8];
  std::memcpy(padded, codes, count);
  collapse(padded, weight, out);
  std::memcpy(bits, out, (count + 7) / 8);
}

void pack_rows(const std::uint8_t* codes, std::uint8_t* planes, const Planes& shape, size_t begin, size_t end) {
  const size_t bytes = shape.row_bytes();
  for (size_t n = begin; n < end; ++n)
    for (size_t i = 0; i < shape.bits; ++i)
      for (size_t k = 0; k < shape.columns; k += kCodes) {
        const size_t left = shape.columns - k;
        collapse_some(codes + n * shape.columns + k, left < kCodes ? left : kCodes, 1u << (shape.bits - 1 - i),
                      planes + (i * shape.rows + n) * bytes + k / 8);
      }
}

void unpack_rows(const Planes& planes, std::uint8_t* codes, size_t begin, size_t end) {
  for (size_t n = begin; n < end; ++n)
    for (size_t k = 0; k < planes.columns; k += kCodes) {
      const size_t left = planes.columns - k;
      expand_columns(planes, n, k, left < kCodes ? left : kCodes, codes + n * planes.columns + k);
    }
}

}  // namespace

extern const PlanesTable planes_table = {pack_rows, unpack_rows};

}  // namespace anybit::ANYBIT_TARGET
