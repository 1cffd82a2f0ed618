// The row kernels every instruction set provides; native/dispatch.cpp picks one table, native/ops.cpp splits rows over threads.
//
// Kernel sources live beside their op (src/anybit/kernels/<op>/cpu.cpp) and are compiled once per target with ANYBIT_TARGET set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anybit {

using std::size_t;

// This header is compiled for every target; a function that the linker could pick from the AVX-512 build would crash elsewhere.
#define ANYBIT_INLINE [[gnu::always_inline]] inline

// Planes uint8 [bits, rows, row_bytes], most significant first; column k of a row is bit k % 8 of byte k / 8.
struct Planes {
  const std::uint8_t* data;
  size_t bits, rows, columns;

  ANYBIT_INLINE size_t row_bytes() const { return (columns + 7) / 8; }
  ANYBIT_INLINE const std::uint8_t* row(size_t plane, size_t n) const { return data + (plane * rows + n) * row_bytes(); }
};

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

struct Kernels {
  size_t row_block;  // rows that one vector holds; work is cut at its multiples

  void (*pack_rows)(const std::uint8_t* codes, std::uint8_t* planes, const Planes& shape, size_t begin, size_t end);
  void (*unpack_rows)(const Planes& planes, std::uint8_t* codes, size_t begin, size_t end);
  // values [end - begin, columns]
  void (*decode_rows)(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end);
  void (*build_tables)(const float* x, size_t columns, size_t group_size, float* tables, float* sums);
  // y [tokens, rows], stride rows; scratch: scratch_floats(row_block, groups) floats of the calling thread.
  void (*linear_rows)(const Planes& planes, const Affine& affine, const Token* tokens, size_t count, float* scratch, float* y,
                      size_t begin, size_t end);
};

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

#define ANYBIT_DECLARE(target)                                                                                                  \
  namespace target {                                                                                                            \
  extern const size_t row_block;                                                                                                \
  void pack_rows(const std::uint8_t*, std::uint8_t*, const Planes&, size_t, size_t);                                            \
  void unpack_rows(const Planes&, std::uint8_t*, size_t, size_t);                                                               \
  void decode_rows(const Planes&, const Affine&, float*, size_t, size_t);                                                       \
  void build_tables(const float*, size_t, size_t, float*, float*);                                                              \
  void linear_rows(const Planes&, const Affine&, const Token*, size_t, float*, float*, size_t, size_t);                         \
  }
ANYBIT_DECLARE(scalar)
#if defined(__x86_64__)
ANYBIT_DECLARE(avx2)
ANYBIT_DECLARE(avx512)
#endif
#undef ANYBIT_DECLARE

}  // namespace anybit
