// A random affine weight as linear_w_a8 reads it, and its plain integers.
#pragma once

#include "exact.h"
#include "linear_w_a8/cpu.h"

namespace anybit {

struct Tiles {
  static constexpr std::uint16_t kHalf = 0x3800, kOne = 0x3C00;  // float16: sums of small integers stay exact

  std::size_t bits, rows, columns, group, groups, blocks, zero_bytes;
  Exact<std::uint8_t> codes, planes, lines, zero, zeros;  // zero [rows, groups]; zeros: tiled
  Exact<std::uint16_t> scale, scales;

  // zero_bytes: 0 (no zeros), 8 (nibbles, up to 4 bits) or 16.
  Tiles(std::size_t bits_, std::size_t rows_, std::size_t columns_, std::size_t group_, std::size_t zero_bytes_)
      : bits(bits_), rows(rows_), columns(columns_), group(std::min(group_, columns_)), groups((columns + group - 1) / group),
        blocks((rows + 15) / 16), zero_bytes(zero_bytes_), codes(rows * columns), planes(bits * rows * ((columns + 7) / 8)),
        lines(bits * blocks * ((columns + 31) / 32) * 64), zero(rows * groups), zeros(blocks * groups * zero_bytes),
        scale(rows * groups), scales(blocks * groups * 16) {
    std::mt19937 random(static_cast<unsigned>(bits * 10007 + rows * 101 + columns));
    fill(codes, random, 0, (1 << bits) - 1), fill(zero, random, 0, (1 << bits) - 1), fill(planes, random, 0, 255);
    for (auto& s : scale) s = random() % 2 ? kHalf : kOne;
    // Planes began as noise, which stays in the padding bits: it must not matter.
    for (std::size_t i = 0; i < bits; ++i)
      for (std::size_t n = 0; n < rows; ++n)
        for (std::size_t k = 0; k < columns; ++k) set_bit(i, n, k);
    tile_planes({planes.data(), bits, rows, columns}, lines.data());
    tile_table(scale.data(), rows, groups, 2, scales.data());
    for (std::size_t n = 0; zero_bytes && n < rows; ++n)
      for (std::size_t g = 0; g < groups; ++g) {
        auto* at = zeros.data() + (n / 16 * groups + g) * zero_bytes;
        const std::size_t r = n % 16;
        at[r % zero_bytes] |= static_cast<std::uint8_t>(zero[n * groups + g] << (r < zero_bytes ? 0 : 4));
      }
  }

  void set_bit(std::size_t plane, std::size_t n, std::size_t k) {
    auto& byte = planes[(plane * rows + n) * ((columns + 7) / 8) + k / 8];
    const auto bit = static_cast<std::uint8_t>(1 << k % 8);
    byte = static_cast<std::uint8_t>(codes[n * columns + k] >> (bits - 1 - plane) & 1 ? byte | bit : byte & ~bit);
  }

  TiledWeight view() const {
    return {lines.data(), scales.data(), zero_bytes ? zeros.data() : nullptr, bits, rows, columns, group, groups, zero_bytes,
            1.0f, 1.0f, zero_bytes ? 0.0f : static_cast<float>(1 << (bits - 1))};
  }

  double factor(std::size_t n, std::size_t g) const { return scale[n * groups + g] == kOne ? 1.0 : 0.5; }
  int zero_of(std::size_t n, std::size_t g) const { return zero_bytes ? zero[n * groups + g] : 1 << (bits - 1); }
};

}  // namespace anybit
