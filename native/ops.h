// Whole operations: rows split over the pool, kernels of the active instruction set. Callers have checked shapes.
#pragma once

#include "kernels.h"

namespace anybit {

void pack_planes(const std::uint8_t* codes, std::uint8_t* planes, size_t bits, size_t rows, size_t columns);
void unpack_planes(const Planes& planes, std::uint8_t* codes);
// Rows [begin, end) as float [end - begin, columns].
void decode_affine(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end);

// y [tokens, rows] = x [tokens, columns] @ W^T; each y[t, n] depends on x[t] and row n alone, bit for bit.
void linear_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y);

}  // namespace anybit
