#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void linear_lut(const LutWeight& w, const std::int8_t* x, const float* x_scale, size_t tokens, const LutResults& results) {
  const LinearLutTable& k = ANYBIT_ACTIVE(linear_lut_table);
  // Read by every worker; they keep their memory between calls.
  static thread_local std::vector<LutTables> tables;
  static thread_local std::vector<std::int32_t> sums;
  tables.resize(tokens * w.chunks());
  sums.resize(tokens * w.groups);
  LutTables* const built = tables.data();  // named here: inside the task, `tables` would be the worker's own
  std::int32_t* const built_sums = sums.data();
  parallel_rows(tokens, 1, 16 * w.columns, [&](size_t begin, size_t end) noexcept {
    for (size_t t = begin; t < end; ++t)
      k.build_tables(x + t * w.columns, w, built + t * w.chunks(), built_sums + t * w.groups);
  });
  const LutTokens prepared{built, built_sums, x_scale, tokens};
  const size_t work = LutWeight::kRows * w.bits * w.columns * tokens;
  parallel_rows(w.row_blocks(), k.block_tile, work,
                [&](size_t begin, size_t end) noexcept { k.linear_blocks(w, prepared, results, begin, end); });
}

}  // namespace anybit
