#include "ops.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "thread_pool.h"

namespace anybit {
namespace {

// Below this many weight bits a second thread costs more than it saves (waking one takes about as long as reading 32 KiB).
constexpr size_t kSerialBits = size_t{1} << 18;

template <class F>
void over_rows(const Planes& planes, size_t grain, F body) {
  const bool small = planes.bits * planes.rows * planes.columns < kSerialBits;
  parallel_for(planes.rows, small ? std::max<size_t>(planes.rows, 1) : grain, body);
}

}  // namespace

void pack_planes(const std::uint8_t* codes, std::uint8_t* planes, size_t bits, size_t rows, size_t columns) {
  const Kernels& k = kernels();
  const Planes shape{nullptr, bits, rows, columns};
  over_rows(shape, k.row_block, [&](size_t begin, size_t end) noexcept { k.pack_rows(codes, planes, shape, begin, end); });
}

void unpack_planes(const Planes& planes, std::uint8_t* codes) {
  const Kernels& k = kernels();
  over_rows(planes, k.row_block, [&](size_t begin, size_t end) noexcept { k.unpack_rows(planes, codes, begin, end); });
}

void decode_affine(const Planes& planes, const Affine& affine, float* values, size_t begin, size_t end) {
  const Kernels& k = kernels();
  const Planes block{nullptr, planes.bits, end - begin, planes.columns};
  over_rows(block, 1, [&](size_t first, size_t last) noexcept {
    k.decode_rows(planes, affine, values + first * planes.columns, begin + first, begin + last);
  });
}

void linear_a16(const Planes& planes, const Affine& affine, const float* x, size_t tokens, float* y) {
  const Kernels& k = kernels();
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
  over_rows(planes, k.row_block, [&](size_t begin, size_t end) noexcept {
    static thread_local std::vector<float> scratch;
    scratch.resize(scratch_floats(k.row_block, affine.groups));
    k.linear_rows(planes, affine, prepared.data(), tokens, scratch.data(), y, begin, end);
  });
}

}  // namespace anybit
