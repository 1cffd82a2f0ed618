#include <algorithm>
#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

template <class Table, class Weight>
void decode_with(const Table& k, const Planes& planes, const Weight& weight, float* values, size_t begin, size_t end) {
  parallel_rows(end - begin, 1, planes.bits * planes.columns, [&](size_t first, size_t last) noexcept {
    k.decode_rows(planes, weight, values + first * planes.columns, begin + first, begin + last);
  });
}

// The caller's tables are read by every worker; each worker has its own scratch. Both keep their memory between calls.
template <class Weight>
void linear_with(const GroupedTable<Weight>& k, const Planes& planes, const Weight& weight, const float* x, size_t tokens,
                 float* y) {
  const LinearA16Table& common = ANYBIT_ACTIVE(linear_w_a16_table);
  const size_t cells = table_count(planes.columns, weight.group_size) * 16;
  static thread_local std::vector<float> shared;
  shared.resize(tokens * (cells + weight.groups));
  std::vector<Token> prepared(tokens);
  for (size_t t = 0; t < tokens; ++t) {
    float* tables = shared.data() + t * (cells + weight.groups);
    common.build_tables(x + t * planes.columns, planes.columns, weight.group_size, tables, tables + cells);
    prepared[t] = {tables, tables + cells};
  }
  parallel_rows(planes.rows, common.row_block, planes.bits * planes.columns, [&](size_t begin, size_t end) noexcept {
    static thread_local std::vector<float> scratch;
    scratch.resize(scratch_floats(common.row_block, weight.groups, planes.bits));
    k.linear_rows(planes, weight, prepared.data(), tokens, scratch.data(), y, begin, end);
  });
}

}  // namespace

void decode(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end) {
  decode_with(ANYBIT_ACTIVE(linear_w_a16_table).affine, planes, affine, values, begin, end);
}

void decode(const Planes& planes, const BinaryCoded& binary, float* values, size_t begin, size_t end) {
  decode_with(ANYBIT_ACTIVE(linear_w_a16_table).binary, planes, binary, values, begin, end);
}

void decode(const Planes& planes, const Codebook& codebook, float* values, size_t begin, size_t end) {
  decode_with(ANYBIT_ACTIVE(codebook_table), planes, codebook, values, begin, end);
}

void linear_w_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y) {
  linear_with(ANYBIT_ACTIVE(linear_w_a16_table).affine, planes, affine, x, tokens, y);
}

void linear_w_a16(const Planes& planes, const BinaryCoded& binary, const float* x, size_t tokens, float* y) {
  linear_with(ANYBIT_ACTIVE(linear_w_a16_table).binary, planes, binary, x, tokens, y);
}

void linear_w_a16(const Planes& planes, const Codebook& codebook, const float* x, size_t tokens, float* y) {
  const size_t stride = codebook_stride(planes.columns);
  static thread_local std::vector<float> shared;
  shared.assign(tokens * stride, 0.0f);
  for (size_t t = 0; t < tokens; ++t)
    std::copy_n(x + t * planes.columns, planes.columns, shared.data() + t * stride);
  const float* padded = shared.data();
  parallel_rows(planes.rows, 1, planes.bits * planes.columns, [&](size_t begin, size_t end) noexcept {
    ANYBIT_ACTIVE(codebook_table).linear_rows(planes, codebook, padded, tokens, y, begin, end);
  });
}

}  // namespace anybit
