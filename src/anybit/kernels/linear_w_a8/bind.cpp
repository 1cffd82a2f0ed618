#include "bind.h"
#include "cpu.h"
#include "weight_at.h"

namespace anybit {
namespace {

Activations activations_at(Address codes, Address scale, Address sums, size_t tokens, const TiledWeight& w) {
  return {at<std::int8_t>(codes), at<float>(scale), at<float>(sums), tokens, w.columns, activation_stride(w.columns), w.group_size,
          w.groups};
}

}  // namespace

// sizes: bits, rows, columns, group_size, groups, zero_bytes; factors: scale_mul, zero_mul, zero_add
void bind_linear_w_a8(nb::module_& m) {
  m.def(
      "tile_planes",
      [](Address planes, Address tiles, size_t bits, size_t rows, size_t columns) {
        tile_planes({at<const std::uint8_t>(planes), bits, rows, columns}, at<std::uint8_t>(tiles));
      },
      "planes"_a, "tiles"_a, "bits"_a, "rows"_a, "columns"_a, Unlocked());
  m.def(
      "tile_table",
      [](Address table, size_t rows, size_t groups, size_t bytes, Address tiled) {
        tile_table(at<const void>(table), rows, groups, bytes, at<void>(tiled));
      },
      "table"_a, "rows"_a, "groups"_a, "bytes"_a, "tiled"_a, Unlocked());
  m.def(
      "linear_w_a8",
      [](Address codes, Address x_scale, Address x_sums, size_t tokens, Address planes, Address scale, Address zero, nb::tuple sizes,
         nb::tuple factors, Address y, Address grain, Address mask) {
        const TiledWeight w = weight_at(planes, scale, zero, sizes, factors, grain, mask);
        const Activations x = activations_at(codes, x_scale, x_sums, tokens, w);
        const nb::gil_scoped_release unlocked;
        linear_w_a8(w, x, at<float>(y), w.rows);
      },
      "codes"_a, "x_scale"_a, "x_sums"_a, "tokens"_a, "planes"_a, "scale"_a, "zero"_a.none(), "sizes"_a, "factors"_a, "y"_a,
      "grain"_a = 0, "mask"_a = 0);
  m.def(
      "linear_w_a8_sums",
      [](Address codes, size_t tokens, Address planes, nb::tuple sizes, Address sums, Address x_sums, Address zero, Address grain,
         Address mask) {
        const TiledWeight w = weight_at(planes, 0, zero, sizes, nb::make_tuple(1.0f, 1.0f, 0.0f), grain, mask);
        const Activations x = activations_at(codes, x_sums, x_sums, tokens, w);
        const nb::gil_scoped_release unlocked;
        linear_w_a8_sums(w, x, at<std::int32_t>(sums));
      },
      "codes"_a, "tokens"_a, "planes"_a, "sizes"_a, "sums"_a,
      "x_sums"_a = 0, "zero"_a = 0, "grain"_a = 0, "mask"_a = 0);
}

}  // namespace anybit
