// Fast Walsh-Hadamard transform of rows, in place; op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

struct HadamardTable {
  void (*transform)(float* row, size_t columns, size_t block);
};
ANYBIT_FOR_TARGETS(extern const HadamardTable hadamard_table;)

// x [rows, columns]: every `block` neighbouring values of a row become H x / sqrt(block), H the Sylvester matrix of size `block`,
// a power of two that divides `columns`. Orthogonal and its own inverse. The same bits on every instruction set.
void hadamard_rows(float* x, size_t rows, size_t columns, size_t block);

}  // namespace anybit
