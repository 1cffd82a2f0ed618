// 16 rows for up to eight tokens: a column of weights is loaded (and widened) once for all of them.
#include "cpu.h"

#include "primitives.h"
#if defined(ANYBIT_TARGET_avx512) || defined(ANYBIT_TARGET_amx)
#include "linear_w_a8/vector_avx512.h"
#elif defined(ANYBIT_TARGET_avx2)
#include "linear_w_a8/vector_avx2.h"
#else
#include "linear_w_a8/vector_scalar.h"
#endif

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kRows = TiledWeight::kRows;

template <size_t T>
ANYBIT_INLINE void add_tokens(const SideWeight& w, const float* side, float* y, size_t y_stride, size_t block) {
  const size_t width = w.groups + w.width, lanes = w.rows - block * kRows < kRows ? w.rows - block * kRows : kRows;
  Reals total[T];
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) {
    alignas(64) float row[kRows] = {};
    const float* from = y + t * y_stride;
    if (lanes < kRows) std::memcpy(row, from, lanes * sizeof *from), from = row;
    total[t] = load_reals(from);
  }
  const auto add = [&](Reals weight, size_t j) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) total[t] = fma(weight, splat(side[t * width + j]), total[t]);
  };
  for (size_t g = 0; g < w.groups; ++g) add(load_reals(w.sums + (block * w.groups + g) * kRows), g);
  for (size_t i = 0; i < w.width; ++i) add(load_halves(w.columns + (block * w.width + i) * kRows), w.groups + i);
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) store(y + t * y_stride, total[t], lanes);
}

void add_blocks(const SideWeight& w, const float* side, size_t tokens, float* y, size_t y_stride, size_t first, size_t last) {
  const size_t width = w.groups + w.width;
  for (size_t block = first; block < last; ++block) {
    size_t t = 0;
    float* to = y + block * kRows;
    for (; t + 8 <= tokens; t += 8) add_tokens<8>(w, side + t * width, to + t * y_stride, y_stride, block);
    if (t + 4 <= tokens) add_tokens<4>(w, side + t * width, to + t * y_stride, y_stride, block), t += 4;
    for (; t < tokens; ++t) add_tokens<1>(w, side + t * width, to + t * y_stride, y_stride, block);
  }
}

}  // namespace

extern const LinearSideTable linear_side_table = {add_blocks};

}  // namespace anybit::ANYBIT_TARGET
