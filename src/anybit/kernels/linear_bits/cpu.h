// Bit-serial y = x W^T: both operands as 1-bit planes, AND and popcount in between; op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

// Planes as rows of 64-bit words: column k is bit k % 64 of word k / 64. Bits beyond the columns are 0.
struct BitRows {
  static constexpr size_t kLine = 8;  // a plane row is padded to a multiple of 8 words, 512 bits

  const std::uint64_t* words;  // [rows][planes][stride]
  size_t planes, stride;

  ANYBIT_INLINE const std::uint64_t* row(size_t n, size_t plane) const { return words + (n * planes + plane) * stride; }
};

// value[n, k] = code[n, k] + offset[n, g], code = sum_i c_i bit_i; y is scaled by scale[n, g]. g = k / group_size.
struct BitWeight {
  BitRows bits;
  const std::int32_t* offset;  // [rows, groups]
  const std::int32_t* sums;    // [rows, groups], of the codes
  const float* scale;          // [rows, groups]; not read for integer results
  size_t rows, columns, group_size, groups;  // group_size a multiple of 64, or one group
};

struct BitTokens {
  BitRows bits;
  const std::int32_t* sums;  // [tokens, groups], of the codes
  const float* scale;        // [tokens]; not read for integer results
  std::int32_t offset;       // of every value
  size_t count;
};

// The p q plane pairs, those of equal coefficient cu_i cv_j side by side: one multiplication serves a whole anti-diagonal.
struct Schedule {
  struct Pair { std::uint8_t i, j; } pairs[64];
  struct Segment { std::int32_t coefficient; std::uint32_t end; } segments[64];  // end: in pairs
  size_t count;  // segments
};

// Where results go: floats y [tokens, rows], or when that is null the exact integers [tokens, rows, groups].
struct BitResults {
  float* y;
  std::int32_t* integers;
};

struct LinearBitsTable {
  size_t row_block;
  // Codes [columns] of one token to its planes [q][stride] and group sums; false when a code does not fit the planes.
  bool (*pack_token)(const std::uint8_t* codes, bool is_signed, const BitWeight& weight, const std::int32_t* coefficients,
                     size_t planes, std::uint64_t* words, std::int32_t* sums);
  // scratch: scratch_sums(groups) integers of the calling thread.
  void (*linear_rows)(const BitWeight& w, const BitTokens& x, const Schedule& schedule, std::int64_t* scratch,
                      const BitResults& results, size_t begin, size_t end);
};
ANYBIT_FOR_TARGETS(extern const LinearBitsTable linear_bits_table;)

ANYBIT_INLINE size_t scratch_sums(size_t groups) { return 8 * groups; }  // the largest tile: 4 rows, 2 tokens

struct BitCodes {
  const std::uint8_t* codes;  // [tokens, columns], int8 or uint8
  bool is_signed;
  size_t tokens;
  const std::int32_t* coefficients;  // of the activation planes
  size_t planes;
  std::int32_t offset;
  const float* scale;  // [tokens]
};

// False, with nothing computed, when a code does not fit its planes.
bool linear_bits(const BitWeight& w, const std::int32_t* coefficients, const BitCodes& x, const BitResults& results);

}  // namespace anybit
