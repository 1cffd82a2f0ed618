// Activations as signed bytes for the integer kernels, optionally straight out of an RMSNorm or a gated activation; op.py has the
// contract. A token's result depends on its row alone and is the same, bit for bit, on every instruction set.
#pragma once

#include "targets.h"

namespace anybit {

// x[t, k] ~ scale[t, k / group_size] * codes[t, k]; codes in -127..127.
struct Activations {
  std::int8_t* codes;  // [tokens, stride], 64-byte aligned, columns beyond `columns` are zero
  float* scale;        // [tokens, groups]; 0 where a group is all zero, NaN where it holds a NaN or an infinity (codes 0)
  float* sums;         // [tokens, groups], the exact sum of the group's codes
  size_t tokens, columns, stride, group_size, groups;  // group_size a multiple of 32, or >= columns: one group
};

// Columns rounded up so that any kernel may read whole vectors, to an odd number of cache lines: with rows a power of two
// apart, 16 tokens would share the few places that one set of the first-level cache has.
ANYBIT_INLINE size_t activation_stride(size_t columns) { return ((columns + 63) / 64 | 1) * 64; }

// How a row becomes codes of 2 to 8 bits: x[k] ~ scale code[k] + offset; formats/activation.py: IntActivations has the arithmetic.
struct Scheme {
  std::int32_t bits = 8;
  bool symmetric = true, rounded_zero = false;
  float clip = 1.0f;
  size_t group_size = 0;                            // columns of one scale: whole groups of the `Activations`, or >= columns
  const float *scale = nullptr, *offset = nullptr;  // static ones of each group, or null
  const std::uint32_t* bypass = nullptr;            // ascending columns that have code 0 and enter no range
  size_t bypassed = 0;

  // Floats beside a row's codes: the offset of each group unless symmetric, then x of the columns that bypass.
  ANYBIT_INLINE size_t side_width(size_t columns) const {
    return (symmetric ? 0 : (columns + group_size - 1) / group_size) + bypassed;
  }
};

enum class Gate { silu, gelu_tanh };

// Below, rows are those of tokens [first, last); many of them are shared among threads. x is [tokens, columns].
void quantize_rows(const float* x, const Activations& out, size_t first, size_t last);

// The same by `scheme`; side [tokens, side_width].
void encode_rows(const float* x, const Scheme& scheme, const Activations& out, float* side, size_t first, size_t last);

// One row and its side.
void encode_row(const float* x, const Scheme& scheme, const Activations& out, float* side, size_t token);

// y = x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) with `plus_one`; weight [columns], or null for none. y may be x.
// A row whose mean square is NaN or overflows becomes NaN.
void rms_norm_rows(const float* x, const float* weight, bool plus_one, float eps, float* y, size_t columns, size_t first,
                   size_t last);

// y = act(gate) * up; gate_up [tokens, 2 columns]: a row is its gates, then its ups. About 1e-6 relative; NaN stays NaN.
void gate_rows(const float* gate_up, Gate gate, float* y, size_t columns, size_t first, size_t last);

struct RmsNorm {
  const float* weight;
  bool plus_one;
  float eps;
};

// One row each; y and x have `columns` floats, and may be the same. The decoder calls these row by row: a norm or a gate, then
// `quantize` while the row is in the first-level cache.
struct QuantizeActivationsTable {
  void (*quantize)(const float* x, const Activations& out, size_t token);
  void (*rms_norm)(const float* x, const RmsNorm& norm, float* y, size_t columns);
  void (*gate)(const float* gate_up, Gate gate, float* y, size_t columns);
};
ANYBIT_FOR_TARGETS(extern const QuantizeActivationsTable quantize_activations_table;)

// One row and its side.
struct EncodeTable {
  void (*encode)(const float* x, const Scheme& scheme, const Activations& out, float* side, size_t token);
};
ANYBIT_FOR_TARGETS(extern const EncodeTable encode_table;)

}  // namespace anybit
