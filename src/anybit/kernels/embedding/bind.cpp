#include "bind.h"
#include "cpu.h"

namespace anybit {

void bind_embedding(nb::module_& m) {
  m.def(
      "embed_rows",
      [](Address planes, Address scale, Address zero, Address ids, Address out, float multiplier, size_t tokens, size_t bits,
         size_t rows, size_t columns, size_t group) {
        const Affine affine{at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), group, (columns + group - 1) / group};
        embed_rows({at<const std::uint8_t>(planes), bits, rows, columns}, affine, at<const std::int64_t>(ids), tokens, multiplier,
                   at<float>(out));
      },
      "planes"_a, "scale"_a, "zero"_a, "ids"_a, "out"_a, "multiplier"_a, "tokens"_a, "bits"_a, "rows"_a, "columns"_a,
      "group_size"_a, Unlocked());
}

}  // namespace anybit
