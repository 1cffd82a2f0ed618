// One row of planes to floats: expand a stretch of codes, then convert it group by group; the reference is reference.py.
#include "cpu.h"

#include "planes/expand.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kStretch = 1024;  // codes at a time, in the first-level cache; a multiple of every kCodes

void embed_row(const Planes& planes, const Affine& affine, size_t row, float multiplier, float* out) {
  alignas(64) std::uint8_t codes[kStretch];
  const size_t columns = planes.columns;
  for (size_t start = 0; start < columns; start += kStretch) {
    const size_t stop = columns - start < kStretch ? columns : start + kStretch;
    for (size_t k = start; k < stop; k += kCodes)
      expand_columns(planes, row, k, stop - k < kCodes ? stop - k : kCodes, codes + (k - start));
    for (size_t k = start; k < stop;) {
      const size_t g = k / affine.group_size, at = row * affine.groups + g;
      const size_t end = (g + 1) * affine.group_size < stop ? (g + 1) * affine.group_size : stop;
      const float scale = half(affine.scale[at]);
      const int zero = affine.zero ? affine.zero[at] : 1 << (planes.bits - 1);
      // The difference is a small integer: exact, as the float one of the reference.
      for (; k < end; ++k) out[k] = static_cast<float>(codes[k - start] - zero) * scale * multiplier;
    }
  }
}

}  // namespace

extern const EmbeddingTable embedding_table = {embed_row};

}  // namespace anybit::ANYBIT_TARGET
