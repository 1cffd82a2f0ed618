// linear_w_a8 and linear_integer under sanitizers: tiles, activations and results of exactly the documented sizes, against plain
// integers.
#include <cmath>
#include <cstring>

#include "linear_integer/cpu.h"
#include "thread_pool.h"
#include "tiles.h"

using namespace anybit;

namespace {

// A 2:4-sparse weight: the kept codes as tiles of half the columns, and which they are.
struct Sparse {
  Tiles whole, kept;
  Exact<std::uint8_t> mask;

  Sparse(size_t bits, size_t rows, size_t columns, size_t group)
      : whole(bits, rows, columns, group, 0), kept(bits, rows, (columns + 3) / 4 * 2, columns, 0),
        mask(whole.blocks * ((columns + 31) / 32) * 64) {
    const auto zero = static_cast<std::uint8_t>(1 << (bits - 1));
    for (size_t n = 0; n < rows; ++n)
      for (size_t k = 0; k < kept.columns * 2; ++k) {
        const size_t four = k / 4, first = (n + four) % 4, second = (first + 1 + four % 3) % 4, c = k % 4;
        auto& code = whole.codes[n * columns + std::min(k, columns - 1)];
        if (c != first && c != second) {
          if (k < columns) code = zero;
          continue;
        }
        const size_t at = four * 2 + (c > std::min(first, second));
        kept.codes[n * kept.columns + at] = k < columns ? code ^ zero : 0;
        mask[(n / 16 * ((columns + 31) / 32) + k / 32) * 64 + n % 16 * 4 + k % 32 / 8] |= static_cast<std::uint8_t>(1 << k % 8);
      }
    for (size_t i = 0; i < bits * rows * kept.columns; ++i)
      kept.set_bit(i / kept.columns / rows, i / kept.columns % rows, i % kept.columns);
    tile_planes({kept.planes.data(), bits, rows, kept.columns}, kept.lines.data());
  }

  TiledWeight view() const {
    TiledWeight w = whole.view();
    w.planes = kept.lines.data(), w.mask = mask.data();
    return w;
  }
};

void check(const Tiles& w, const TiledWeight& view, size_t tokens) {
  const size_t stride = activation_stride(w.columns);
  std::mt19937 random(static_cast<unsigned>(tokens));
  Exact<std::int8_t> codes(tokens * stride);
  Exact<float> x_scale(tokens * w.groups, 0.5f), x_sums(tokens * w.groups), y(tokens * w.rows);
  Exact<std::int32_t> sums(tokens * w.groups * w.rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < w.columns; ++k) {
      codes[t * stride + k] = static_cast<std::int8_t>(static_cast<int>(random() % 17) - 8);
      x_sums[t * w.groups + k / w.group] += codes[t * stride + k];
    }
  const Activations x{codes.data(), x_scale.data(), x_sums.data(), tokens, w.columns, stride, w.group, w.groups};
  linear_w_a8_sums(view, x, sums.data());
  linear_w_a8(view, x, y.data(), w.rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < w.rows; ++n) {
      double want = 0;
      for (size_t g = 0; g < w.groups; ++g) {
        long long sum = 0;
        for (size_t k = g * w.group; k < std::min(w.columns, (g + 1) * w.group); ++k)
          sum += static_cast<long long>(codes[t * stride + k]) * w.codes[n * w.columns + k];
        expect(sums[(t * w.groups + g) * w.rows + n] == sum, "integer sum", n, w.columns, w.bits);
        want += w.factor(n, g) * 0.5 * (static_cast<double>(sum) - w.zero_of(n, g) * static_cast<double>(x_sums[t * w.groups + g]));
      }
      expect(y[t * w.rows + n] == static_cast<float>(want), "linear_w_a8", n, w.columns, w.bits);
    }
}

// A whole layer, with an offset and a float column: bfloat16 rows against float32 ones.
void check_layer(const Tiles& w, const TiledWeight& view, size_t tokens) {
  const std::uint32_t bypass = static_cast<std::uint32_t>(w.columns / 2);
  Exact<float> x(tokens * w.columns), y(tokens * w.rows), row_sums(w.blocks * 16, 0.25f);
  Exact<std::uint16_t> halves(tokens * w.columns), y_halves(tokens * w.rows), columns(w.blocks * 16, 0x3800);  // float16 0.5
  IntegerLayer layer{view, {row_sums.data(), columns.data(), 1, 1, w.rows}, {}};
  layer.scheme.symmetric = false, layer.scheme.group_size = w.columns, layer.scheme.bypass = &bypass, layer.scheme.bypassed = 1;
  std::mt19937 random(static_cast<unsigned>(tokens));
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<float>(static_cast<int>(random() % 17) - 8);
    std::memcpy(&halves[i], reinterpret_cast<char*>(&x[i]) + 2, 2);
  }
  linear_integer(layer, {x.data(), y.data(), tokens, false});
  linear_integer(layer, {halves.data(), y_halves.data(), tokens, true});
  for (size_t i = 0; i < y.size(); ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(y_halves[i]) << 16;
    float half;
    std::memcpy(&half, &bits, sizeof half);
    expect(std::abs(half - y[i]) <= std::abs(y[i]) / 256, "bfloat16 rows", i, w.columns, w.bits);
  }
}

void check_all() {
  size_t turn = 0;
  const size_t tokens[] = {1, 2, 3, 5, 16, 35, 83};
  for (size_t bits = 1; bits <= 8; ++bits)
    for (size_t columns : {1, 31, 33, 64, 65, 129, 257})
      for (size_t group : {size_t{32}, size_t{64}, columns})
        for (size_t rows : {1, 16, 35}) {
          const size_t zero_bytes[] = {0, 16, size_t{bits <= 4 ? 8u : 16u}};
          const Tiles dense(bits, rows, columns, group, zero_bytes[turn % 3]);
          check(dense, dense.view(), tokens[turn % 7]);
          check_layer(dense, dense.view(), tokens[turn % 7]);
          if (bits > 1 && group != 32) {
            const Sparse sparse(bits, rows, columns, group);
            check(sparse.whole, sparse.view(), tokens[turn % 7]);
          }
          turn += turn % 11 == 10 ? 2 : 1;  // so that zeros, tokens and shapes do not keep step
        }
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_all();
    std::printf("linear_w_a8 on %s ok\n", isa.c_str());
  }
}
