#include "bind.h"
#include "cpu.h"

namespace anybit {

// y float32 [tokens, rows], side float32 [tokens, groups + width]
void bind_linear_side(nb::module_& m) {
  m.def(
      "add_side",
      [](Address side, size_t tokens, Address sums, size_t groups, Address columns, size_t width, size_t rows, Address y) {
        const SideWeight w{at<const float>(sums), at<const std::uint16_t>(columns), groups, width, rows};
        add_side(w, at<const float>(side), tokens, at<float>(y), rows);
      },
      "side"_a, "tokens"_a, "sums"_a, "groups"_a, "columns"_a, "width"_a, "rows"_a, "y"_a, Unlocked());
}

}  // namespace anybit
