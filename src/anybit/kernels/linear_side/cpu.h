// y += s W^T where s is a few floats a token: offsets of activations times sums of weights, float columns; op.py has the contract.
#pragma once

#include "linear_w_a8/cpu.h"

namespace anybit {

// Rows in lanes, blocks of 16: what is multiplied with a token's side [groups + width].
struct SideWeight {
  const float* sums = nullptr;              // [row_blocks][groups][16]; padding rows 0
  const std::uint16_t* columns = nullptr;   // float16 [row_blocks][width][16]; padding rows 0
  size_t groups = 0, width = 0, rows = 0;   // rows: N

  ANYBIT_INLINE size_t row_blocks() const { return (rows + TiledWeight::kRows - 1) / TiledWeight::kRows; }
  ANYBIT_INLINE size_t bytes() const { return row_blocks() * TiledWeight::kRows * (groups * sizeof(*sums) + width * sizeof(*columns)); }
};

struct LinearSideTable {
  // Rows [16 first, 16 last) of y [tokens, y_stride].
  void (*add_blocks)(const SideWeight& w, const float* side, size_t tokens, float* y, size_t y_stride, size_t first, size_t last);
};
ANYBIT_FOR_TARGETS(extern const LinearSideTable linear_side_table;)

// side [tokens, groups + width]. In order of the side, each product added to y with one rounding: y[t, n] depends on its token and
// row alone, bit for bit, on every instruction set.
void add_side(const SideWeight& w, const float* side, size_t tokens, float* y, size_t y_stride);

// linear_w_a8 and then the side (where it has one), a few row blocks at a time, so that y is still in the cache.
void linear_w_a8_side(const TiledWeight& w, const Activations& x, const SideWeight& beside, const float* side, float* y,
                      size_t y_stride);

}  // namespace anybit
