#include "bind.h"
#include "cpu.h"
#include "linear_w_a8/weight_at.h"
#include "quantize_activations/scheme.h"

namespace anybit {

// The arrays behind the addresses must outlive the layer.
void bind_linear_integer(nb::module_& m) {
  nb::class_<IntegerLayer>(m, "IntegerLayer")
      .def("__init__",
           [](IntegerLayer* layer, Address planes, Address scale, Address zero, nb::tuple sizes, nb::tuple factors, Address grain,
              Address mask) { new (layer) IntegerLayer{weight_at(planes, scale, zero, sizes, factors, grain, mask), {}, {}}; },
           "planes"_a, "scale"_a, "zero"_a, "sizes"_a, "factors"_a, "grain"_a, "mask"_a)
      .def(
          "set_scheme",
          [](IntegerLayer& layer, nb::tuple facts, Address scale, Address offset, Address bypass, size_t bypassed) {
            layer.scheme = scheme_at(facts, scale, offset, bypass, bypassed);
          },
          "facts"_a, "scale"_a, "offset"_a, "bypass"_a, "bypassed"_a)
      .def(
          "set_side",
          [](IntegerLayer& layer, Address sums, size_t groups, Address columns, size_t width) {
            layer.side = {at<const float>(sums), at<const std::uint16_t>(columns), groups, width, layer.weight.rows};
          },
          "sums"_a, "groups"_a, "columns"_a, "width"_a)
      .def(
          "multiply",
          [](const IntegerLayer& layer, Address x, Address y, size_t tokens, bool halves) {
            linear_integer(layer, {at<const void>(x), at<void>(y), tokens, halves});
          },
          "x"_a, "y"_a, "tokens"_a, "halves"_a, Unlocked());
}

}  // namespace anybit
