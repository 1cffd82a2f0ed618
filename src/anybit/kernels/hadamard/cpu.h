// Fast Walsh-Hadamard transform of rows, in place; op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

// Every `order * power` neighbouring values x of a row become x (F (x) H_power) / sqrt(order * power): F a Hadamard matrix of any
// order, H_power Sylvester's of a power of two.
struct Rotation {
  const float* factor = nullptr;   // F [order, order], entries 1 and -1; null where order is 1
  size_t order = 1, power = 0;     // power 0: no rotation
};

struct HadamardTable {
  void (*transform)(float* row, size_t columns, size_t block);
  void (*rotate)(float* row, size_t columns, const Rotation& by);
};
ANYBIT_FOR_TARGETS(extern const HadamardTable hadamard_table;)

// x [rows, columns]: every `block` neighbouring values of a row become H x / sqrt(block), H the Sylvester matrix of size `block`,
// a power of two that divides `columns`. Orthogonal and its own inverse. The same bits on every instruction set.
void hadamard_rows(float* x, size_t rows, size_t columns, size_t block);

// x [rows, columns] by `by`, whose order * power divides `columns`. The same bits on every instruction set.
void rotate_rows(float* x, size_t rows, size_t columns, const Rotation& by);

}  // namespace anybit
