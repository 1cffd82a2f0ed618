// y = x W^T for affine bit-planes and float activations; op.py has the contract.
#pragma once

#include "planes.h"

namespace anybit {

// value[n, k] = scale[n, g] * (code[n, k] - zero[n, g]) with g = k / group_size.
struct Affine {
  const std::uint16_t* scale;  // float16 bits [rows, groups]
  const std::uint8_t* zero;    // uint8 [rows, groups], or null: 2^(bits-1)
  size_t group_size, groups;
};

// One token prepared for linear_rows; both arrays are shared by all rows.
struct Token {
  const float* tables;  // [table_count][16]: the 16 signed sums of four neighbouring columns, group by group
  const float* sums;    // [groups]: plain sum of x over each group
};

struct LinearA16Table {
  size_t row_block;  // rows that one vector holds; work is cut at its multiples
  // values [end - begin, columns]
  void (*decode_rows)(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end);
  void (*build_tables)(const float* x, size_t columns, size_t group_size, float* tables, float* sums);
  // y [tokens, rows], stride rows; scratch: scratch_floats(row_block, groups) floats of the calling thread.
  void (*linear_rows)(const Planes& planes, const Affine& affine, const Token* tokens, size_t count, float* scratch, float* y,
                      size_t begin, size_t end);
};
ANYBIT_FOR_TARGETS(extern const LinearA16Table linear_w_a16_table;)

ANYBIT_INLINE size_t scratch_floats(size_t row_block, size_t groups) { return 2 * row_block * groups; }

// Four-column cells that the groups touch; a cell that two groups share counts twice.
ANYBIT_INLINE size_t table_count(size_t columns, size_t group_size) {
  size_t count = 0;
  for (size_t start = 0; start < columns; start += group_size) {
    const size_t end = start + group_size < columns ? start + group_size : columns;
    count += (end + 3) / 4 - start / 4;
  }
  return count;
}

// Rows [begin, end) as float [end - begin, columns].
void decode_affine(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end);

// y [tokens, rows] = x [tokens, columns] @ W^T; each y[t, n] depends on x[t] and row n alone, bit for bit.
void linear_w_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y);

}  // namespace anybit
