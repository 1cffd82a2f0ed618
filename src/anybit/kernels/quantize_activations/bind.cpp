#include <algorithm>

#include "bind.h"
#include "cpu.h"
#include "scheme.h"

namespace anybit {
namespace {

Activations activations_at(Address codes, Address scale, Address sums, size_t tokens, size_t columns, size_t group) {
  const size_t groups = (columns + group - 1) / group;
  return {at<std::int8_t>(codes), at<float>(scale), at<float>(sums), tokens, columns, activation_stride(columns), group, groups};
}

}  // namespace

// scheme: bits, symmetric, rounded_zero, clip, group_size
void bind_quantize_activations(nb::module_& m) {
  m.def(
      "encode_rows",
      [](Address x, Address codes, Address scale, Address sums, Address side, size_t tokens, size_t columns, size_t group,
         nb::tuple scheme, Address fixed_scale, Address fixed_offset, Address bypass, size_t bypassed) {
        const Scheme by = scheme_at(scheme, fixed_scale, fixed_offset, bypass, bypassed);
        const nb::gil_scoped_release unlocked;
        encode_rows(at<const float>(x), by, activations_at(codes, scale, sums, tokens, columns, group), at<float>(side), 0, tokens);
      },
      "x"_a, "codes"_a, "scale"_a, "sums"_a, "side"_a, "tokens"_a, "columns"_a, "group_size"_a, "scheme"_a, "fixed_scale"_a,
      "fixed_offset"_a, "bypass"_a, "bypassed"_a);
  m.def(
      "quantize_rows",
      [](Address x, Address codes, Address scale, Address sums, size_t tokens, size_t columns, size_t group) {
        quantize_rows(at<const float>(x), activations_at(codes, scale, sums, tokens, columns, group), 0, tokens);
      },
      "x"_a, "codes"_a, "scale"_a, "sums"_a, "tokens"_a, "columns"_a, "group_size"_a, Unlocked());
  m.def(
      "rms_norm_rows",
      [](Address x, Address weight, bool plus_one, float eps, Address y, size_t tokens, size_t columns) {
        rms_norm_rows(at<const float>(x), at<const float>(weight), plus_one, eps, at<float>(y), columns, 0, tokens);
      },
      "x"_a, "weight"_a, "plus_one"_a, "eps"_a, "y"_a, "tokens"_a, "columns"_a, Unlocked());
  m.def(
      "gate_rows",
      [](Address gate_up, bool gelu, Address y, size_t tokens, size_t columns) {
        gate_rows(at<const float>(gate_up), gelu ? Gate::gelu_tanh : Gate::silu, at<float>(y), columns, 0, tokens);
      },
      "gate_up"_a, "gelu"_a, "y"_a, "tokens"_a, "columns"_a, Unlocked());
}

}  // namespace anybit
