#include "bind.h"
#include "cpu.h"

namespace anybit {

void bind_linear_bf16(nb::module_& m) {
  m.def(
      "linear_bf16",
      [](Address weight, Address x, Address y, size_t tokens, size_t rows, size_t columns) {
        linear_bf16(at<const std::uint16_t>(weight), at<const float>(x), tokens, rows, columns, at<float>(y));
      },
      "weight"_a, "x"_a, "y"_a, "tokens"_a, "rows"_a, "columns"_a, Unlocked());
}

}  // namespace anybit
