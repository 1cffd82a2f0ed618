// A weight as Python hands it over: addresses, 0 for none, sizes (bits, rows, columns, group_size, groups, zero_bytes) and factors
// (scale_mul, zero_mul, zero_add).
#pragma once

#include "bind.h"
#include "linear_w_a8/cpu.h"

namespace anybit {

inline TiledWeight weight_at(Address planes, Address scale, Address zero, const nb::tuple& sizes, const nb::tuple& factors,
                             Address grain, Address mask) {
  const auto size = [&](int i) { return nb::cast<size_t>(sizes[i]); };
  const auto factor = [&](int i) { return nb::cast<float>(factors[i]); };
  return {at<const std::uint8_t>(planes), at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), size(0), size(1), size(2),
          size(3), size(4), size(5), factor(0), factor(1), factor(2), at<const std::uint8_t>(grain),
          at<const std::uint8_t>(mask)};
}

}  // namespace anybit
