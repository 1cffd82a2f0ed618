// Schemes of activations, sides, rotations and dual-grained weights under sanitizers: arrays of exactly the documented sizes,
// against plain arithmetic that is exact.
#include <cmath>
#include <vector>

#include "hadamard/cpu.h"
#include "linear_side/cpu.h"
#include "thread_pool.h"
#include "tiles.h"

using namespace anybit;

namespace {

// x holds halves of small integers: scales of powers of two keep every step exact.
void check_encode(size_t columns, size_t reach, size_t group, bool symmetric, size_t bypassed, size_t tokens) {
  std::mt19937 random(static_cast<unsigned>(columns + reach + tokens));
  Scheme s;
  s.bits = 4, s.symmetric = symmetric, s.group_size = std::min(reach, columns);
  const size_t size = std::min(group, columns), groups = (columns + size - 1) / size, stride = activation_stride(columns);
  const size_t count = (columns + s.group_size - 1) / s.group_size, width = (symmetric ? 0 : count) + bypassed;
  Exact<float> x(tokens * columns), scale(tokens * groups), sums(tokens * groups), side(tokens * width + !width), fixed(count, 0.5f);
  Exact<float> offset(count, 1.0f);
  Exact<std::int8_t> codes(tokens * stride, 99);
  Exact<std::uint32_t> bypass(bypassed + !bypassed);
  fill(x, random, -20, 20);
  for (size_t i = 0; i < bypassed; ++i) bypass[i] = static_cast<std::uint32_t>(i * columns / bypassed);
  s.scale = fixed.data(), s.offset = symmetric ? nullptr : offset.data(), s.bypass = bypass.data(), s.bypassed = bypassed;
  expect(s.side_width(columns) == width, "side width", columns);
  const Activations out{codes.data(), scale.data(), sums.data(), tokens, columns, stride, size, groups};
  encode_rows(x.data(), s, out, side.data(), 0, tokens);
  for (size_t t = 0; t < tokens; ++t) {
    std::vector<float> sum(groups);
    for (size_t k = 0; k < columns; ++k) {
      const bool out_of_it = std::find(bypass.begin(), bypass.begin() + bypassed, k) != bypass.begin() + bypassed;
      const float steps = (x[t * columns + k] - (symmetric ? 0.0f : 1.0f)) * 2.0f;
      const float want = out_of_it ? 0.0f : std::min(7.0f, std::max(symmetric ? -7.0f : -8.0f, steps));
      expect(codes[t * stride + k] == static_cast<int>(want), "code", t, k, columns);
      sum[k / size] += want;
    }
    for (size_t k = columns; k < stride; ++k) expect(codes[t * stride + k] == 0, "padding", t, k);
    for (size_t g = 0; g < groups; ++g)
      expect(sums[t * groups + g] == sum[g] && scale[t * groups + g] == 0.5f, "sums and scales", t, g);
    for (size_t i = 0; i < bypassed; ++i)
      expect(side[t * width + width - bypassed + i] == x[t * columns + bypass[i]], "columns of the side", t, i);
  }
  s.scale = s.offset = nullptr;  // dynamic: memory alone is checked here, numbers by the Python tests
  for (bool zero : {false, true}) s.rounded_zero = zero, encode_rows(x.data(), s, out, side.data(), 0, tokens);
}

void check_side(size_t rows, size_t groups, size_t width, size_t tokens) {
  std::mt19937 random(static_cast<unsigned>(rows + groups + width));
  const size_t blocks = (rows + 15) / 16, all = groups + width;
  Exact<float> sums(blocks * groups * 16), side(tokens * all), y(tokens * rows), before(tokens * rows);
  Exact<std::uint16_t> columns(blocks * width * 16);
  fill(side, random, -9, 9), fill(y, random, -9, 9), fill(sums, random, -9, 9);
  for (auto& c : columns) c = random() % 2 ? Tiles::kHalf : Tiles::kOne;
  std::copy(y.begin(), y.end(), before.begin());
  const SideWeight w{sums.data(), columns.data(), groups, width, rows};
  add_side(w, side.data(), tokens, y.data(), rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < rows; ++n) {
      float want = before[t * rows + n];
      for (size_t j = 0; j < all; ++j) {
        const float weight = j < groups ? sums[(n / 16 * groups + j) * 16 + n % 16]
                             : columns[(n / 16 * width + j - groups) * 16 + n % 16] == Tiles::kOne ? 1.0f : 0.5f;
        want += side[t * all + j] * weight;
      }
      expect(y[t * rows + n] == want, "side", t, n, width);
    }
}

void check_grains(size_t bits, size_t rows, size_t columns, size_t group, size_t tokens) {
  const Tiles base(bits, rows, columns, group, bits <= 4 ? 8 : 16);
  const size_t stride = activation_stride(columns);
  std::mt19937 random(static_cast<unsigned>(tokens));
  Exact<std::uint8_t> grain(base.blocks * base.groups * 16);
  Exact<std::uint16_t> scale(base.blocks * 16, Tiles::kHalf);
  Exact<std::int8_t> codes(tokens * stride);
  Exact<float> x_scale(tokens * base.groups, 0.5f), x_sums(tokens * base.groups), y(tokens * rows);
  Exact<std::int32_t> sums(tokens * rows);
  for (auto& g : grain) g = static_cast<std::uint8_t>(1 + random() % (128 >> bits));
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < columns; ++k) {
      codes[t * stride + k] = static_cast<std::int8_t>(static_cast<int>(random() % 9) - 4);
      x_sums[t * base.groups + k / base.group] += codes[t * stride + k];
    }
  TiledWeight w = base.view();
  w.grain = grain.data(), w.scale = scale.data();
  const Activations x{codes.data(), x_scale.data(), x_sums.data(), tokens, columns, stride, base.group, base.groups};
  linear_w_a8_sums(w, x, sums.data());
  linear_w_a8(w, x, y.data(), rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < rows; ++n) {
      long long want = 0;
      for (size_t k = 0; k < columns; ++k) {
        const size_t g = k / base.group;
        want += static_cast<long long>(grain[(n / 16 * base.groups + g) * 16 + n % 16]) *
                (base.codes[n * columns + k] - base.zero_of(n, g)) * codes[t * stride + k];
      }
      expect(sums[t * rows + n] == want, "dual-grained sum", n, columns, bits);
      expect(y[t * rows + n] == 0.25f * static_cast<float>(want), "dual-grained", n, columns, tokens);
    }
}

void check_rotation(size_t order, size_t power, size_t columns, size_t rows) {
  std::mt19937 random(static_cast<unsigned>(order + power));
  Exact<float> factor(order * order), x(rows * columns), before(rows * columns);
  for (auto& f : factor) f = random() % 2 ? 1.0f : -1.0f;
  fill(x, random, -4, 4);
  std::copy(x.begin(), x.end(), before.begin());
  const size_t block = order * power;
  rotate_rows(x.data(), rows, columns, {order > 1 ? factor.data() : nullptr, order, power});
  for (size_t i = 0; i < rows * columns; ++i) {
    const size_t start = i / block * block, a = i % block / power, b = i % power;
    double want = 0;
    for (size_t j = 0; j < block; ++j) {
      const double sign = __builtin_popcountll(j % power & b) % 2 ? -1 : 1;
      want += before[start + j] * sign * (order > 1 ? factor[j / power * order + a] : 1.0f);
    }
    expect(std::fabs(x[i] - want / std::sqrt(static_cast<double>(block))) < 1e-5, "rotation", order, power, i);
  }
}

void check_all() {
  size_t turn = 0;
  for (size_t columns : {1, 31, 33, 64, 129, 257})
    for (size_t reach : {size_t{64}, columns})
      for (size_t group : {size_t{32}, size_t{64}, columns}) {
        if (reach < columns && group > reach) continue;
        check_encode(columns, reach, group, turn % 2 == 0, std::min<size_t>(turn % 4, columns), 1 + turn % 3), ++turn;
      }
  for (size_t rows : {1, 16, 35})
    for (size_t tokens : {1, 5, 11}) check_side(rows, 1, 0, tokens), check_side(rows, 0, 3, tokens), check_side(rows, 2, 5, tokens);
  for (size_t bits : {2, 4, 5})
    for (size_t columns : {33, 129, 256})
      for (size_t group : {size_t{32}, size_t{64}, columns})
        for (size_t tokens : {1, 3, 11, 21, 83}) check_grains(bits, 35, columns, group, tokens);
  check_rotation(1, 8, 24, 3), check_rotation(3, 4, 12, 2), check_rotation(5, 2, 20, 2), check_rotation(3, 32, 192, 2);
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_all();
    std::printf("activations on %s ok\n", isa.c_str());
  }
}
