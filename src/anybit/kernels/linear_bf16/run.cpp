#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void linear_bf16(const std::uint16_t* weight, const float* x, size_t tokens, size_t rows, size_t columns, float* y) {
  const LinearBf16Table& k = ANYBIT_ACTIVE(linear_bf16_table);
  static thread_local std::vector<float> prepared;
  const size_t pitch = k.prepared_floats(columns);
  if (prepared.size() < tokens * pitch) prepared.resize(tokens * pitch);
  const float* ready = prepared.data();
  for (size_t t = 0; t < tokens; ++t) k.prepare(x + t * columns, columns, prepared.data() + t * pitch);
  for (size_t t = 0; t < tokens; t += 4) {
    const size_t count = tokens - t < 4 ? tokens - t : 4;
    parallel_rows(rows, 16, 16 * columns, [&](size_t begin, size_t end) noexcept {
      k.rows(weight, ready + t * pitch, count, rows, columns, y + t * rows, begin, end);
    });
  }
}

}  // namespace anybit
