// y = x W^T for bit-plane weights and bfloat16 activations, many tokens at a time; op.py has the contract.
#pragma once

#include "halves.h"
#include "linear_w_a8/cpu.h"

namespace anybit {

// Activations as bfloat16 bits [tokens, stride]; columns beyond `columns` are zero up to the next multiple of 32.
struct HalfActivations {
  std::uint16_t* values;  // 64-byte aligned
  size_t tokens, columns, stride;
};

struct LinearBf16TilesTable {
  // Null where there is no matrix unit: callers ask linear_w_bf16_runs() first. Row blocks [first, last) go in pairs: `first` is
  // even, and so is `last` unless it is the end.
  void (*run_blocks)(const TiledWeight& w, const HalfActivations& x, float* y, size_t y_stride, size_t first, size_t last);
  // Row t of `out` from x [columns], rounded to nearest even; the padding is written too.
  void (*round_row)(const float* x, const HalfActivations& out, size_t t);
};
ANYBIT_FOR_TARGETS(extern const LinearBf16TilesTable linear_w_bf16_table;)

// An odd number of cache lines apart, for the reason that activation_stride has.
ANYBIT_INLINE size_t half_stride(size_t columns) { return ((columns + 31) / 32 | 1) * 32; }

bool linear_w_bf16_runs();

// y [tokens, y_stride]: columns [0, rows) of each token are written. Weights are decoded to bfloat16 (one rounding), sums are
// float32 in the order of the hardware: each y[t, n] depends on x[t] and row n alone, bit for bit.
void linear_w_bf16(const TiledWeight& w, const HalfActivations& x, float* y, size_t y_stride);

// The same for rows of float32, rounded here, or of bfloat16: y then is bfloat16 too, the same sums rounded once.
void linear_w_bf16(const TiledWeight& w, const Rows& rows);

// Of x float32 [tokens, columns].
void round_to_bf16(const float* x, const HalfActivations& out);

}  // namespace anybit
