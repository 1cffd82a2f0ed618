#include "bind.h"
#include "cpu.h"

namespace anybit {
namespace {

Affine affine_at(Address scale, Address zero, size_t group_size, size_t columns) {
  return {at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), group_size, (columns + group_size - 1) / group_size};
}

}  // namespace

void bind_linear_w_a16(nb::module_& m) {
  m.def(
      "decode_affine",
      [](Address planes, Address scale, Address zero, Address values, size_t bits, size_t rows, size_t columns, size_t group,
         size_t begin, size_t end) {
        decode_affine({at<const std::uint8_t>(planes), bits, rows, columns}, affine_at(scale, zero, group, columns),
                      at<float>(values), begin, end);
      },
      "planes"_a, "scale"_a, "zero"_a, "values"_a, "bits"_a, "rows"_a, "columns"_a, "group_size"_a, "begin"_a, "end"_a,
      Unlocked());
  m.def(
      "linear_w_a16",
      [](Address x, Address planes, Address scale, Address zero, Address y, size_t tokens, size_t bits, size_t rows, size_t columns,
         size_t group) {
        linear_w_a16({at<const std::uint8_t>(planes), bits, rows, columns}, affine_at(scale, zero, group, columns),
                     at<const float>(x), tokens, at<float>(y));
      },
      "x"_a, "planes"_a, "scale"_a, "zero"_a, "y"_a, "tokens"_a, "bits"_a, "rows"_a, "columns"_a, "group_size"_a, Unlocked());
}

}  // namespace anybit
