#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

void run(const TiledWeight& w, const Activations& x, const Output& out) {
  const LinearA8Table& k = ANYBIT_ACTIVE(linear_w_a8_table);
  parallel_rows(w.row_blocks(), 1, TiledWeight::kRows * w.columns * w.bits * x.tokens,
                [&](size_t first, size_t last) noexcept { k.run_blocks(w, x, out, first, last); });
}

template <class T>
void tile_rows(const T* table, size_t rows, size_t groups, T* tiled) {
  constexpr size_t kRows = TiledWeight::kRows;
  parallel_rows((rows + kRows - 1) / kRows, 1, kRows * groups * 8 * sizeof(T), [=](size_t first, size_t last) noexcept {
    for (size_t block = first; block < last; ++block)
      for (size_t g = 0; g < groups; ++g)
        for (size_t r = 0; r < kRows; ++r) {
          const size_t n = block * kRows + r;
          tiled[(block * groups + g) * kRows + r] = n < rows ? table[n * groups + g] : T{};
        }
  });
}

}  // namespace

void linear_w_a8(const TiledWeight& w, const Activations& x, float* y, size_t y_stride) { run(w, x, {y, y_stride, nullptr}); }

void linear_w_a8_sums(const TiledWeight& w, const Activations& x, std::int32_t* sums) { run(w, x, {nullptr, 0, sums}); }

void linear_w_a8_blocks(const TiledWeight& w, const Activations& x, float* y, size_t y_stride, size_t first, size_t last) {
  ANYBIT_ACTIVE(linear_w_a8_table).run_blocks(w, x, {y, y_stride, nullptr}, first, last);
}

void tile_planes(const Planes& planes, std::uint8_t* tiles) {
  const LinearA8Table& k = ANYBIT_ACTIVE(linear_w_a8_table);
  parallel_rows((planes.rows + TiledWeight::kRows - 1) / TiledWeight::kRows, 1, TiledWeight::kRows * planes.columns * planes.bits,
                [&](size_t first, size_t last) noexcept { k.tile_blocks(planes, tiles, first, last); });
}

void tile_table(const void* table, size_t rows, size_t groups, size_t bytes, void* tiled) {
  if (bytes == 1) return tile_rows(static_cast<const std::uint8_t*>(table), rows, groups, static_cast<std::uint8_t*>(tiled));
  tile_rows(static_cast<const std::uint16_t*>(table), rows, groups, static_cast<std::uint16_t*>(tiled));
}

}  // namespace anybit
