// y = x W^T for bfloat16 weights and float32 activations of a few tokens; op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

struct LinearBf16Table {
  size_t (*prepared_floats)(size_t columns);  // of one token
  void (*prepare)(const float* x, size_t columns, float* out);
  // y [tokens, rows]: columns [begin, end); tokens is 1..4, x prepared
  void (*rows)(const std::uint16_t* weight, const float* x, size_t tokens, size_t rows, size_t columns, float* y, size_t begin,
               size_t end);
};
ANYBIT_FOR_TARGETS(extern const LinearBf16Table linear_bf16_table;)

// y [tokens, rows] from weight bfloat16 [rows, columns] and x [tokens, columns]. The weight is read once per four tokens. Each
// y[t, n] depends on x[t] and row n alone, bit for bit: not on other tokens or threads.
void linear_bf16(const std::uint16_t* weight, const float* x, size_t tokens, size_t rows, size_t columns, float* y);

}  // namespace anybit
