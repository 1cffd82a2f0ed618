#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void hadamard_rows(float* x, size_t rows, size_t columns, size_t block) {
  const HadamardTable& k = ANYBIT_ACTIVE(hadamard_table);
  parallel_rows(rows, 1, 8 * columns, [&](size_t begin, size_t end) noexcept {
    for (size_t n = begin; n < end; ++n) k.transform(x + n * columns, columns, block);
  });
}

}  // namespace anybit
