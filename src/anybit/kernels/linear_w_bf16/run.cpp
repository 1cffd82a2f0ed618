#include <algorithm>

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

void linear_w_bf16(const TiledWeight& w, const Rows& rows) {
  static thread_local Scratch<std::uint16_t> scratch;
  const size_t stride = half_stride(w.columns), padded = (w.columns + 31) / 32 * 32;
  const HalfActivations x{scratch.at_least(rows.tokens * stride), rows.tokens, w.columns, stride};
  if (!rows.halves) {
    round_to_bf16(static_cast<const float*>(rows.x), x);
    return linear_w_bf16(w, x, static_cast<float*>(rows.y), w.rows);
  }
  for (size_t t = 0; t < rows.tokens; ++t) {
    const auto* from = static_cast<const std::uint16_t*>(rows.x) + t * w.columns;
    std::fill(std::copy(from, from + w.columns, x.values + t * stride), x.values + t * stride + padded, std::uint16_t{0});
  }
  const auto run = ANYBIT_ACTIVE(linear_w_bf16_table).run_blocks;
  parallel_rows(w.row_blocks(), 2, TiledWeight::kRows * w.columns * w.bits * x.tokens, [&](size_t first, size_t last) noexcept {
    in_halves(x.tokens, w.rows, static_cast<std::uint16_t*>(rows.y), first, last,
              [&](float* y, size_t y_stride, size_t from, size_t to) { run(w, x, y, y_stride, from, to); });
  });
}

}  // namespace anybit
