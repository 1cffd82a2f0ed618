#include "bind.h"
#include "cpu.h"

namespace anybit {

void bind_machine(nb::module_& m) {
  m.def(
      "seconds_to_read",
      [](Address data, size_t bytes) { return seconds_to_read(at<const std::uint8_t>(data), bytes); },
      "data"_a, "bytes"_a, Unlocked());
  m.def(
      "multiply_adds_per_second",
      [](int peak, size_t steps) { return multiply_adds_per_second(static_cast<Peak>(peak), steps); },
      "peak"_a, "steps"_a, Unlocked());
}

}  // namespace anybit
