#include <algorithm>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

constexpr size_t kTokens = 256;  // at a time: what linear_w_a8 expands a weight for at most

struct Between {
  Scratch<std::int8_t> codes;
  Scratch<float> scale, sums, side;
};

// Codes of the rows from `first` on, and their side.
void encode(const Scheme& scheme, const Rows& rows, size_t first, const Activations& out, float* side) {
  const size_t columns = out.columns, width = scheme.side_width(columns);
  if (!rows.halves)
    return encode_rows(static_cast<const float*>(rows.x) + first * columns, scheme, out, side, 0, out.tokens);
  const auto widen = ANYBIT_ACTIVE(halves_table).widen;
  const auto* x = static_cast<const std::uint16_t*>(rows.x) + first * columns;
  parallel_rows(out.tokens, 1, 8 * columns, [&](size_t begin, size_t end) noexcept {
    static thread_local Scratch<float> scratch;
    float* row = scratch.at_least(columns);
    for (size_t t = begin; t < end; ++t) {
      widen(x + t * columns, row, columns);
      encode_row(row, scheme, out, side + t * width, t);
    }
  });
}

// Row blocks [first, last) of y [tokens, y_stride].
void multiply(const IntegerLayer& layer, const Activations& x, const float* side, float* y, size_t y_stride, size_t first,
              size_t last) {
  linear_w_a8_blocks(layer.weight, x, y, y_stride, first, last);
  if (layer.side.groups + layer.side.width)
    ANYBIT_ACTIVE(linear_side_table).add_blocks(layer.side, side, x.tokens, y, y_stride, first, last);
}

}  // namespace

void linear_integer(const IntegerLayer& layer, const Rows& rows) {
  static thread_local Between between;
  const TiledWeight& w = layer.weight;
  const size_t most = std::min(kTokens, rows.tokens), stride = activation_stride(w.columns);
  Activations x{between.codes.at_least(most * stride), between.scale.at_least(most * w.groups), between.sums.at_least(most * w.groups),
                most, w.columns, stride, w.group_size, w.groups};
  float* side = between.side.at_least(most * layer.scheme.side_width(w.columns));
  for (size_t first = 0, count; first < rows.tokens; first += count) {
    x.tokens = count = std::min(most, rows.tokens - first);
    encode(layer.scheme, rows, first, x, side);
    parallel_rows(w.row_blocks(), 1, TiledWeight::kRows * w.columns * w.bits * count, [&](size_t begin, size_t end) noexcept {
      const auto run = [&](float* y, size_t stride, size_t from, size_t to) { multiply(layer, x, side, y, stride, from, to); };
      if (rows.halves)
        in_halves(count, w.rows, static_cast<std::uint16_t*>(rows.y) + first * w.rows, begin, end, run);
      else
        run(static_cast<float*>(rows.y) + first * w.rows, w.rows, begin, end);
    });
  }
}

}  // namespace anybit
