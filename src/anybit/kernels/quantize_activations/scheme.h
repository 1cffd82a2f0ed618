// A scheme as Python hands it over: (bits, symmetric, rounded_zero, clip, group_size) and addresses, 0 for none.
#pragma once

#include "bind.h"
#include "quantize_activations/cpu.h"

namespace anybit {

inline Scheme scheme_at(const nb::tuple& facts, Address scale, Address offset, Address bypass, size_t bypassed) {
  Scheme s;
  s.bits = nb::cast<std::int32_t>(facts[0]), s.symmetric = nb::cast<bool>(facts[1]), s.rounded_zero = nb::cast<bool>(facts[2]);
  s.clip = nb::cast<float>(facts[3]), s.group_size = nb::cast<size_t>(facts[4]);
  s.scale = at<const float>(scale), s.offset = at<const float>(offset);
  s.bypass = at<const std::uint32_t>(bypass), s.bypassed = bypassed;
  return s;
}

}  // namespace anybit
