#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

bool linear_w_bf16_runs() { return ANYBIT_ACTIVE(linear_w_bf16_table).run_blocks != nullptr; }

void linear_w_bf16(const TiledWeight& w, const HalfActivations& x, float* y, size_t y_stride) {
  const auto run = ANYBIT_ACTIVE(linear_w_bf16_table).run_blocks;
  parallel_rows(w.row_blocks(), 2, TiledWeight::kRows * w.columns * w.bits * x.tokens,
                [&](size_t first, size_t last) noexcept { run(w, x, y, y_stride, first, last); });
}

void round_to_bf16(const float* x, const HalfActivations& out) {
  const auto round_row = ANYBIT_ACTIVE(linear_w_bf16_table).round_row;
  parallel_rows(out.tokens, 1, out.columns * 8, [&](size_t first, size_t last) noexcept {
    for (size_t t = first; t < last; ++t) round_row(x + t * out.columns, out, t);
  });
}

}  // namespace anybit
