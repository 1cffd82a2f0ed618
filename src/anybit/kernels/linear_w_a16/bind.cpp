#include "bind.h"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "cpu.h"

namespace anybit {
namespace {

using Sizes = std::tuple<size_t, size_t, size_t, size_t>;  // bits, rows, columns, group_size

Planes planes_at(Address data, const Sizes& sizes) {
  return {at<const std::uint8_t>(data), std::get<0>(sizes), std::get<1>(sizes), std::get<2>(sizes)};
}

// What lies beside the planes; groups = ceil(columns / group_size).
Affine affine(Address scale, Address zero, size_t group_size, size_t groups) {
  return {at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), group_size, groups};
}
Affine odd(Address scale, Address, size_t group_size, size_t groups) {
  return bipolar(at<const std::uint16_t>(scale), group_size, groups);
}
Affine fractional(Address scale, Address zero, size_t group_size, size_t groups) {
  return {at<const std::uint16_t>(scale), nullptr, group_size, groups, 1.0f, 0.0f, at<const std::uint16_t>(zero)};
}
BinaryCoded binary_coded(Address alpha, Address offset, size_t group_size, size_t groups) {
  return {at<const std::uint16_t>(alpha), at<const std::uint16_t>(offset), group_size, groups};
}
Codebook codebook(Address table, Address, size_t, size_t) { return {at<const std::uint16_t>(table)}; }

template <auto make>
auto weight_at(Address first, Address second, const Sizes& sizes) {
  const auto [bits, rows, columns, group] = sizes;
  return make(first, second, group, (columns + group - 1) / group);
}

template <auto make>
void bind(nb::module_& m, const char* linear, const char* decode_rows) {
  m.def(
      linear,
      [](Address x, Address y, size_t tokens, Address planes, Address first, Address second, const Sizes& sizes) {
        linear_w_a16(planes_at(planes, sizes), weight_at<make>(first, second, sizes), at<const float>(x), tokens,
                     at<float>(y));
      },
      "x"_a, "y"_a, "tokens"_a, "planes"_a, "first"_a, "second"_a, "sizes"_a, Unlocked());
  m.def(
      decode_rows,
      [](Address values, size_t begin, size_t end, Address planes, Address first, Address second,
         const Sizes& sizes) {
        decode(planes_at(planes, sizes), weight_at<make>(first, second, sizes), at<float>(values), begin, end);
      },
      "values"_a, "begin"_a, "end"_a, "planes"_a, "first"_a, "second"_a, "sizes"_a, Unlocked());
}

}  // namespace

void bind_linear_w_a16(nb::module_& m) {
  bind<affine>(m, "linear_w_a16_affine", "decode_affine");
  bind<odd>(m, "linear_w_a16_bipolar", "decode_bipolar");
  bind<fractional>(m, "linear_w_a16_fractional", "decode_fractional");
  bind<binary_coded>(m, "linear_w_a16_binary_coded", "decode_binary_coded");
  bind<codebook>(m, "linear_w_a16_codebook", "decode_codebook");
}

}  // namespace anybit
