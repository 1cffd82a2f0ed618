// y = x W^T for bit-plane weights and int8 activations: exact int32 sums per group, one float epilogue; op.py has the contract.
#pragma once

#include "planes.h"
#include "quantize_activations/cpu.h"

namespace anybit {

// Planes repacked so that one 64-byte line is 16 rows x 32 columns of one plane (NOTES.md draws it).
//
// w[n, k] = scale_mul scale[n, g] (code[n, k] - (zero_mul zero[n, g] + zero_add)), g = k / group_size.
//
// Dual-grained (DGQ, QoQ), where `grain` is set: w[n, k] = scale[n] (grain[n, g] (code[n, k] - zero[n, g])), the inner product a
// signed byte. Its groups are summed in integers and scaled once a row, so an activation's scale is one for the whole token.
//
// 2:4 sparse, where `mask` is set: planes hold the two kept codes of every four columns alone (the tiles of half the columns, so
// a line covers 64), as two's complement around the grid's zero 2^(bits - 1), which all other columns are. A line of masks is 32
// columns of 16 rows, a bit each, a word a row. Symmetric codes only, read at the width they are stored at; groups of whole lines.
struct TiledWeight {
  static constexpr size_t kRows = 16, kColumns = 32, kBytes = 64;

  const std::uint8_t* planes;   // [bits][row_blocks][chunks][64], most significant plane first; padding rows and columns are 0
  const std::uint16_t* scale;   // float16 [row_blocks][groups][16], dual-grained [row_blocks][16]; padding rows 0
  const std::uint8_t* zero;     // [row_blocks][groups][zero_bytes], or null: zero_add alone
  size_t bits, rows, columns;   // planes stored, N, K
  size_t group_size, groups;    // group_size a multiple of 32, or groups == 1
  size_t zero_bytes;            // 16: a byte a row; 8: row r in the low nibble of byte r, row r + 8 in the high one
  float scale_mul, zero_mul, zero_add;
  const std::uint8_t* grain = nullptr;  // [row_blocks][groups][16], or null; padding rows 0
  const std::uint8_t* mask = nullptr;   // 2:4 sparse: [row_blocks][chunks][64], or null

  ANYBIT_INLINE size_t row_blocks() const { return (rows + kRows - 1) / kRows; }
  ANYBIT_INLINE size_t chunks() const { return (columns + kColumns - 1) / kColumns; }
  ANYBIT_INLINE size_t line_columns() const { return mask ? 2 * kColumns : kColumns; }
  ANYBIT_INLINE size_t lines() const { return (columns + line_columns() - 1) / line_columns(); }  // of a plane, a row block
  ANYBIT_INLINE size_t plane_bytes() const { return row_blocks() * lines() * kBytes; }
  // What a kernel reads of it: the planes in use, with their padding, and both tables.
  ANYBIT_INLINE size_t bytes() const {
    const size_t scales = grain ? kRows * (groups + sizeof(*scale)) : kRows * groups * sizeof(*scale);
    return bits * plane_bytes() + row_blocks() * (scales + (zero ? groups * zero_bytes : 0) + (mask ? chunks() * kBytes : 0));
  }
  // Whether sum - zero * sum of activations is a difference of whole numbers that float32 might round: it is then taken in
  // integers. Sums of up to 512 columns are exact either way.
  ANYBIT_INLINE bool whole_zeros() const {
    const bool whole = zero ? zero_mul == 1.0f && zero_add == 0.0f : zero_add == static_cast<float>(static_cast<int>(zero_add));
    return whole && (group_size < columns ? group_size : columns) > 512;
  }
};

// y [tokens, y_stride]: columns [0, rows) of each token are written. Only the first w.bits planes are read, so a nested weight
// runs at lower precision by lowering `bits` (and setting the three scalars). Activation groups are the weight's, or one a token.
// Each y[t, n] depends on x[t] and row n alone, bit for bit: not on other tokens, threads, or how rows are split. Groups of x are
// the groups of w.
void linear_w_a8(const TiledWeight& w, const Activations& x, float* y, size_t y_stride);

// The same for rows [16 first, 16 last) on the calling thread, for callers that share rows out themselves.
void linear_w_a8_blocks(const TiledWeight& w, const Activations& x, float* y, size_t y_stride, size_t first, size_t last);

// The int32 sums [tokens, groups, rows] of codes times codes, before any float: what tests compare with int64. Dual-grained: of
// whole rows, the sums [tokens, rows] of bytes times codes.
void linear_w_a8_sums(const TiledWeight& w, const Activations& x, std::int32_t* sums);

// Planes [bits, rows, row_bytes] into tiles; padding bits of the source are ignored.
void tile_planes(const Planes& planes, std::uint8_t* tiles);

// A table [rows][groups] of elements of 1 or 2 bytes as [row_blocks][groups][16]; padding rows 0.
void tile_table(const void* table, size_t rows, size_t groups, size_t bytes, void* tiled);

// Where linear_w_a8 leaves its result: either `y`, or with `sums` the integers alone.
struct Output {
  float* y;
  size_t y_stride;
  std::int32_t* sums;
};

struct LinearA8Table {
  void (*run_blocks)(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last);
  void (*tile_blocks)(const Planes& planes, std::uint8_t* tiles, size_t first, size_t last);
};
ANYBIT_FOR_TARGETS(extern const LinearA8Table linear_w_a8_table;)

}  // namespace anybit
