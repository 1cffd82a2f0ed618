#include "bind.h"
#include "cpu.h"
#include "linear_w_a8/weight_at.h"

namespace anybit {

// sizes and factors as for linear_w_a8; x and y float32, or with `halves` bfloat16
void bind_linear_w_bf16(nb::module_& m) {
  m.def("linear_w_bf16_runs", &linear_w_bf16_runs);
  m.def(
      "linear_w_bf16",
      [](Address x, size_t tokens, bool halves, Address planes, Address scale, Address zero, nb::tuple sizes, nb::tuple factors,
         Address y) {
        const TiledWeight w = weight_at(planes, scale, zero, sizes, factors, 0, 0);
        const nb::gil_scoped_release unlocked;
        linear_w_bf16(w, {at<const void>(x), at<void>(y), tokens, halves});
      },
      "x"_a, "tokens"_a, "halves"_a, "planes"_a, "scale"_a, "zero"_a, "sizes"_a, "factors"_a, "y"_a);
}

}  // namespace anybit
