#include <nanobind/stl/tuple.h>

#include <tuple>

#include "bind.h"
#include "cpu.h"

namespace anybit {

// weight: lines, coefficients, offset, scale (addresses); sizes: bits, rows, columns, group_size, groups, tokens.
void bind_linear_lut(nb::module_& m) {
  using Weight = std::tuple<Address, Address, Address, Address>;
  using Sizes = std::tuple<size_t, size_t, size_t, size_t, size_t, size_t>;
  m.def(
      "linear_lut",
      [](Address x, Address x_scale, const Weight& weight, const Sizes& sizes, Address y, Address integers) {
        const auto [lines, coefficients, offset, scale] = weight;
        const auto [bits, rows, columns, group_size, groups, tokens] = sizes;
        const LutWeight w{at<const std::uint8_t>(lines), at<const std::int8_t>(coefficients), at<const std::int32_t>(offset),
                          at<const float>(scale), bits, rows, columns, group_size, groups};
        linear_lut(w, at<const std::int8_t>(x), at<const float>(x_scale), tokens, {at<float>(y), at<std::int32_t>(integers)});
      },
      "x"_a, "x_scale"_a, "weight"_a, "sizes"_a, "y"_a, "integers"_a, Unlocked());
}

}  // namespace anybit
