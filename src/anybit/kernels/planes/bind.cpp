#include "bind.h"
#include "cpu.h"

namespace anybit {

void bind_planes(nb::module_& m) {
  m.def(
      "pack_planes",
      [](Address codes, Address planes, size_t bits, size_t rows, size_t columns) {
        pack_planes(at<const std::uint8_t>(codes), at<std::uint8_t>(planes), bits, rows, columns);
      },
      "codes"_a, "planes"_a, "bits"_a, "rows"_a, "columns"_a, Unlocked());
  m.def(
      "unpack_planes",
      [](Address planes, Address codes, size_t bits, size_t rows, size_t columns) {
        unpack_planes({at<const std::uint8_t>(planes), bits, rows, columns}, at<std::uint8_t>(codes));
      },
      "planes"_a, "codes"_a, "bits"_a, "rows"_a, "columns"_a, Unlocked());
}

}  // namespace anybit
