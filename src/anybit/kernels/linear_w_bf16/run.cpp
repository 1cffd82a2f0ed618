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

namespace {

constexpr size_t kTokens = 2048;  // at a time: the weight is expanded anew for each, and a thread keeps as many rows of memory

void copy_row(const std::uint16_t* x, const HalfActivations& out, size_t t) {
  std::uint16_t* end = std::copy(x, x + out.columns, out.values + t * out.stride);
  std::fill(end, end + (32 - out.columns % 32) % 32, std::uint16_t{0});
}

}  // namespace

void linear_w_bf16(const TiledWeight& w, const Rows& rows) {
  static thread_local Scratch<std::uint16_t> scratch;
  const size_t most = std::min(kTokens, rows.tokens), stride = half_stride(w.columns);
  HalfActivations x{scratch.at_least(most * stride), most, w.columns, stride};
  const auto run = ANYBIT_ACTIVE(linear_w_bf16_table).run_blocks;
  for (size_t first = 0; first < rows.tokens; first += x.tokens) {
    x.tokens = std::min(most, rows.tokens - first);
    if (!rows.halves) {
      round_to_bf16(static_cast<const float*>(rows.x) + first * w.columns, x);
      linear_w_bf16(w, x, static_cast<float*>(rows.y) + first * w.rows, w.rows);
      continue;
    }
    for (size_t t = 0; t < x.tokens; ++t) copy_row(static_cast<const std::uint16_t*>(rows.x) + (first + t) * w.columns, x, t);
    auto* to = static_cast<std::uint16_t*>(rows.y) + first * w.rows;
    parallel_rows(w.row_blocks(), 2, TiledWeight::kRows * w.columns * w.bits * x.tokens, [&](size_t begin, size_t end) noexcept {
      in_halves(x.tokens, w.rows, to, begin, end,
                [&](float* y, size_t y_stride, size_t from, size_t last) { run(w, x, y, y_stride, from, last); });
    });
  }
}

}  // namespace anybit
