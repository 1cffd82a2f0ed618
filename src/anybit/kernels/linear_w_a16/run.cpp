#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void decode_affine(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end) {
  const LinearA16Table& k = ANYBIT_ACTIVE(linear_w_a16_table);
  parallel_rows(end - begin, 1, planes.bits * planes.columns, [&](size_t first, size_t last) noexcept {
    k.decode_rows(planes, affine, values + first * planes.columns, begin + first, begin + last);
  });
}

void linear_w_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y) {
  const LinearA16Table& k = ANYBIT_ACTIVE(linear_w_a16_table);
  const size_t cells = table_count(planes.columns, affine.group_size) * 16;
  // The caller's tables are read by every worker; each worker has its own scratch. Both keep their memory between calls.
  static thread_local std::vector<float> shared;
  shared.resize(tokens * (cells + affine.groups));
  std::vector<Token> prepared(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    float* tables = shared.data() + t * (cells + affine.groups);
    k.build_tables(x + t * planes.columns, planes.columns, affine.group_size, tables, tables + cells);
    prepared[t] = {tables, tables + cells};
  }
  parallel_rows(planes.rows, k.row_block, planes.bits * planes.columns, [&](size_t begin, size_t end) noexcept {
    static thread_local std::vector<float> scratch;
    scratch.resize(scratch_floats(k.row_block, affine.groups));
    k.linear_rows(planes, affine, prepared.data(), tokens, scratch.data(), y, begin, end);
  });
}

}  // namespace anybit
