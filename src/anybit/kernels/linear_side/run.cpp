#include "cpu.h"
#include "thread_pool.h"

namespace anybit {

void add_side(const SideWeight& w, const float* side, size_t tokens, float* y, size_t y_stride) {
  const auto add = ANYBIT_ACTIVE(linear_side_table).add_blocks;
  parallel_rows(w.row_blocks(), 1, TiledWeight::kRows * (w.groups + w.width) * 16 * tokens,
                [&](size_t first, size_t last) noexcept { add(w, side, tokens, y, y_stride, first, last); });
}

void linear_w_a8_side(const TiledWeight& w, const Activations& x, const SideWeight& beside, const float* side, float* y,
                      size_t y_stride) {
  if (!beside.groups && !beside.width) return linear_w_a8(w, x, y, y_stride);
  constexpr size_t kAtOnce = 4, kFew = 16;
  const auto add = ANYBIT_ACTIVE(linear_side_table).add_blocks;
  parallel_rows(w.row_blocks(), 1, TiledWeight::kRows * w.columns * w.bits * x.tokens, [&](size_t first, size_t last) noexcept {
    const size_t step = x.tokens <= kFew ? last - first : kAtOnce;
    for (; first < last; first += step) {
      const size_t stop = first + step < last ? first + step : last;
      linear_w_a8_blocks(w, x, y, y_stride, first, stop);
      add(beside, side, x.tokens, y, y_stride, first, stop);
    }
  });
}

}  // namespace anybit
