#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void hadamard_rows(float* x, size_t rows, size_t columns, size_t block) {
  const HadamardTable& k = ANYBIT_ACTIVE(hadamard_table);
  parallel_rows(rows, 1, 8 * columns, [&](size_t begin, size_t end) noexcept {
    for (size_t n = begin; n < end; ++n) k.transform(x + n * columns, columns, block);
  });
}

void rotate_rows(float* x, size_t rows, size_t columns, const Rotation& by) {
  const auto rotate = ANYBIT_ACTIVE(hadamard_table).rotate;
  parallel_rows(rows, 1, 8 * columns * by.order, [&](size_t begin, size_t end) noexcept {
    for (size_t n = begin; n < end; ++n) rotate(x + n * columns, columns, by);
  });
}

}  // namespace anybit
