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

// Codes of tokens [first, first + count), and their side.
Activations encode(const IntegerLayer& layer, const Rows& rows, size_t first, size_t count, Between& between, float*& side) {
  const TiledWeight& w = layer.weight;
  const size_t stride = activation_stride(w.columns), width = layer.scheme.side_width(w.columns);
  const Activations out{between.codes.at_least(count * stride), between.scale.at_least(count * w.groups),
                        between.sums.at_least(count * w.groups), count, w.columns, stride, w.group_size, w.groups};
  side = between.side.at_least(count * width);
  if (!rows.halves) {
    encode_rows(static_cast<const float*>(rows.x) + first * w.columns, layer.scheme, out, side, 0, count);
    return out;
  }
  const auto widen = ANYBIT_ACTIVE(halves_table).widen;
  const auto* x = static_cast<const std::uint16_t*>(rows.x) + first * w.columns;
  parallel_rows(count, 1, 8 * w.columns, [&, to = side](size_t begin, size_t end) noexcept {
    static thread_local Scratch<float> row;
    for (size_t t = begin; t < end; ++t) {
      widen(x + t * w.columns, row.at_least(w.columns), w.columns);
      encode_row(row.at_least(w.columns), layer.scheme, out, to + t * width, t);
    }
  });
  return out;
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
  for (size_t first = 0, count; first < rows.tokens; first += count) {
    count = std::min(kTokens, rows.tokens - first);
    float* side;
    const Activations x = encode(layer, rows, first, count, between, side);
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
