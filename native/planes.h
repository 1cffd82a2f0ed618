// Bit-planes as they are saved.
#pragma once

#include "targets.h"

namespace anybit {

// uint8 [bits, rows, row_bytes], most significant first; column k of a row is bit k % 8 of byte k / 8.
struct Planes {
  const std::uint8_t* data;
  size_t bits, rows, columns;

  ANYBIT_INLINE size_t row_bytes() const { return (columns + 7) / 8; }
  ANYBIT_INLINE const std::uint8_t* row(size_t plane, size_t n) const { return data + (plane * rows + n) * row_bytes(); }
};

}  // namespace anybit
