// Rows of an affine bit-plane table as floats; op.py has the contract.
#pragma once

#include "linear_w_a16/cpu.h"

namespace anybit {

struct EmbeddingTable {
  void (*embed_row)(const Planes& planes, const Affine& affine, size_t row, float multiplier, float* out);
};
ANYBIT_FOR_TARGETS(extern const EmbeddingTable embedding_table;)

// out[t, k] = scale[ids[t], g] * (code[ids[t], k] - zero[ids[t], g]) * multiplier, g = k / group_size; out [tokens, columns].
// Every id is in [0, planes.rows): the caller checks.
void embed_rows(const Planes& planes, const Affine& affine, const std::int64_t* ids, size_t tokens, float multiplier,
                float* out);

}  // namespace anybit
