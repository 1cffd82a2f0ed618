#include "bind.h"
#include "cpu.h"

namespace anybit {

// sizes and factors as for linear_w_a8; x float32 [tokens, columns], scratch 64-byte aligned of tokens * half_stride 16-bit values
void bind_linear_w_bf16(nb::module_& m) {
  m.def("linear_w_bf16_runs", &linear_w_bf16_runs);
  m.def(
      "linear_w_bf16",
      [](Address x, Address scratch, size_t tokens, Address planes, Address scale, Address zero, nb::tuple sizes,
         nb::tuple factors, Address y) {
        const auto size = [&](int i) { return nb::cast<size_t>(sizes[i]); };
        const auto factor = [&](int i) { return nb::cast<float>(factors[i]); };
        const TiledWeight w{at<const std::uint8_t>(planes), at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), size(0), size(1),
                            size(2), size(3), size(4), size(5), factor(0), factor(1), factor(2)};
        const HalfActivations halves{at<std::uint16_t>(scratch), tokens, w.columns, half_stride(w.columns)};
        const nb::gil_scoped_release unlocked;
        round_to_bf16(at<const float>(x), halves);
        linear_w_bf16(w, halves, at<float>(y), w.rows);
      },
      "x"_a, "scratch"_a, "tokens"_a, "planes"_a, "scale"_a, "zero"_a, "sizes"_a, "factors"_a, "y"_a);
}

}  // namespace anybit
