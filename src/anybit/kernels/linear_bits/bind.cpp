#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "bind.h"
#include "cpu.h"

namespace anybit {

// weight: words, offset, sums, scale (addresses); sizes: rows, columns, word stride, group_size, groups, tokens.
void bind_linear_bits(nb::module_& m) {
  using Weight = std::tuple<Address, Address, Address, Address>;
  using Sizes = std::tuple<size_t, size_t, size_t, size_t, size_t, size_t>;
  m.def(
      "linear_bits",
      [](Address codes, bool is_signed, Address x_scale, const std::vector<std::int32_t>& x_coefficients, std::int32_t x_offset,
         const Weight& weight, const std::vector<std::int32_t>& coefficients, const Sizes& sizes, Address y, Address integers) {
        const auto [rows, columns, stride, group_size, groups, tokens] = sizes;
        const auto [words, offset, sums, scale] = weight;
        const BitWeight w{{at<const std::uint64_t>(words), coefficients.size(), stride},
                          at<const std::int32_t>(offset),
                          at<const std::int32_t>(sums),
                          at<const float>(scale),
                          rows,
                          columns,
                          group_size,
                          groups};
        const BitCodes x{at<const std::uint8_t>(codes), is_signed, tokens,
                         x_coefficients.data(), x_coefficients.size(), x_offset, at<const float>(x_scale)};
        return linear_bits(w, coefficients.data(), x, {at<float>(y), at<std::int32_t>(integers)});
      },
      "codes"_a, "is_signed"_a, "x_scale"_a, "x_coefficients"_a, "x_offset"_a, "weight"_a, "coefficients"_a, "sizes"_a, "y"_a,
      "integers"_a, Unlocked());
}

}  // namespace anybit
