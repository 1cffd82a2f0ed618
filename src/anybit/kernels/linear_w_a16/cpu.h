// y = x W^T for bit-planes and float activations; op.py, binary_coded.py and codebook.py have the contracts.
#pragma once

#include "planes.h"

namespace anybit {

// value[n, k] = scale_mul scale[n, g] * (code[n, k] - (zero[n, g] + zero_add)) with g = k / group_size; zero is one of three:
// bytes, float16 where there is `fraction`, or 2^(bits-1).
struct Affine {
  const std::uint16_t* scale;  // float16 bits [rows, groups]
  const std::uint8_t* zero;    // uint8 [rows, groups], or null
  size_t group_size, groups;
  float scale_mul = 1;         // a power of two, so that nothing is rounded
  float zero_add = 0;          // a multiple of 1/2
  const std::uint16_t* fraction = nullptr;  // float16 bits [rows, groups]: zeros of a nested weight lie between codes
};

// value[n, k] = scale[n, g] * (2 code[n, k] - (2^bits - 1)): no zeros.
ANYBIT_INLINE Affine bipolar(const std::uint16_t* scale, size_t group_size, size_t groups) {
  return {scale, nullptr, group_size, groups, 2.0f, -0.5f};
}

// value[n, k] = offset[n, g] + sum_i alpha[n, g, i] * (2 bit_i[n, k] - 1).
struct BinaryCoded {
  const std::uint16_t* alpha;   // float16 bits [rows, groups, bits]
  const std::uint16_t* offset;  // float16 bits [rows, groups], or null: 0
  size_t group_size, groups;
};

// value[n, k] = table[n, code[n, k]].
struct Codebook {
  const std::uint16_t* table;  // float16 bits [rows, 2^bits], finite
};

// One token prepared for linear_rows; both arrays are shared by all rows.
struct Token {
  const float* tables;  // [table_count][16]: the 16 signed sums of four neighbouring columns, group by group
  const float* sums;    // [groups]: plain sum of x over each group
};

// Weight is Affine or BinaryCoded.
template <class Weight>
struct GroupedTable {
  // values [end - begin, columns]
  void (*decode_rows)(const Planes& planes, const Weight& weight, float* values, size_t begin, size_t end);
  // y [tokens, rows], stride rows; scratch: scratch_floats(row_block, groups, bits) floats of the calling thread.
  void (*linear_rows)(const Planes& planes, const Weight& weight, const Token* tokens, size_t count, float* scratch, float* y,
                      size_t begin, size_t end);
};

struct LinearA16Table {
  size_t row_block;  // rows that one vector holds; work is cut at its multiples
  void (*build_tables)(const float* x, size_t columns, size_t group_size, float* tables, float* sums);
  GroupedTable<Affine> affine;
  GroupedTable<BinaryCoded> binary;
};
ANYBIT_FOR_TARGETS(extern const LinearA16Table linear_w_a16_table;)

struct CodebookTable {
  void (*decode_rows)(const Planes& planes, const Codebook& codebook, float* values, size_t begin, size_t end);
  // x [tokens, stride], zero from `columns` to codebook_stride(columns); y [tokens, rows]
  void (*linear_rows)(const Planes& planes, const Codebook& codebook, const float* x, size_t tokens, float* y, size_t begin,
                      size_t end);
};
ANYBIT_FOR_TARGETS(extern const CodebookTable codebook_table;)

ANYBIT_INLINE size_t codebook_stride(size_t columns) { return (columns + 63) / 64 * 64; }

ANYBIT_INLINE size_t scratch_floats(size_t row_block, size_t groups, size_t bits) { return (bits + 1) * row_block * groups; }

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
void decode(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end);
void decode(const Planes& planes, const BinaryCoded& binary, float* values, size_t begin, size_t end);
void decode(const Planes& planes, const Codebook& codebook, float* values, size_t begin, size_t end);

// y [tokens, rows] = x [tokens, columns] @ W^T; each y[t, n] depends on x[t] and row n alone, bit for bit.
void linear_w_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y);
void linear_w_a16(const Planes& planes, const BinaryCoded& binary, const float* x, size_t tokens, float* y);
void linear_w_a16(const Planes& planes, const Codebook& codebook, const float* x, size_t tokens, float* y);

}  // namespace anybit
