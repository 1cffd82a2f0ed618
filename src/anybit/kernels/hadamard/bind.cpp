#include "bind.h"
#include "cpu.h"

namespace anybit {

void bind_hadamard(nb::module_& m) {
  m.def(
      "hadamard_rows",
      [](Address x, size_t rows, size_t columns, size_t block) { hadamard_rows(at<float>(x), rows, columns, block); }, "x"_a,
      "rows"_a, "columns"_a, "block"_a, Unlocked());
  m.def(
      "rotate_rows",
      [](Address x, size_t rows, size_t columns, Address factor, size_t order, size_t power) {
        rotate_rows(at<float>(x), rows, columns, {at<const float>(factor), order, power});
      },
      "x"_a, "rows"_a, "columns"_a, "factor"_a, "order"_a, "power"_a, Unlocked());
}

}  // namespace anybit
