// y = x W^T by table look-up, without loss: int8 activations, planes of 1 to 4 bits; op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

// One 64-byte line is 16 rows x 32 columns of one plane: byte 16 j + r holds columns 8 j .. 8 j + 7 of row r, low bit first.
//
// value[n, k] = code[n, k] + offset[n, g], code = sum_i c_i bit_i; y is scaled by scale[n, g]. g = k / group_size.
struct LutWeight {
  static constexpr size_t kRows = 16, kColumns = 32, kBytes = 64;

  const std::uint8_t* lines;         // [row_blocks][chunks][bits][64]; padding rows are 0
  const std::int8_t* coefficients;   // [bits]
  const std::int32_t* offset;        // [row_blocks][groups][16]
  const float* scale;                // [row_blocks][groups][16]; not read for integer results
  size_t bits, rows, columns, group_size, groups;  // group_size a multiple of 32, or one group

  ANYBIT_INLINE size_t row_blocks() const { return (rows + kRows - 1) / kRows; }
  ANYBIT_INLINE size_t chunks() const { return (columns + kColumns - 1) / kColumns; }
};

// The 16 subset sums of four neighbouring activations, plus 512, so that they are 0..1020: low and high bytes apart. A chunk has
// eight such cells; [2 s + h][j][e] is byte h of entry e of the cell of columns 8 j + 4 s ...
struct alignas(64) LutTables {
  static constexpr int kBias = 512;
  static constexpr size_t kCells = 8;
  std::uint8_t bytes[4][4][16];
};

struct LutTokens {
  const LutTables* tables;   // [tokens][chunks]
  const std::int32_t* sums;  // [tokens][groups], of the activations
  const float* scale;        // [tokens]; not read for integer results
  size_t count;
};

// Floats y [tokens, rows], or when that is null the exact integers [tokens, rows, groups].
struct LutResults {
  float* y;
  std::int32_t* integers;
};

struct LinearLutTable {
  size_t block_tile;  // row blocks that share a table in registers
  void (*build_tables)(const std::int8_t* x, const LutWeight& w, LutTables* tables, std::int32_t* sums);
  void (*linear_blocks)(const LutWeight& w, const LutTokens& x, const LutResults& results, size_t begin, size_t end);
};
ANYBIT_FOR_TARGETS(extern const LinearLutTable linear_lut_table;)

void linear_lut(const LutWeight& w, const std::int8_t* x, const float* x_scale, size_t tokens, const LutResults& results);

}  // namespace anybit
