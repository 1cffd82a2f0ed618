// Lossless look-up: per plane, four weight bits choose one of the 16 subset sums of four activations; lookup.h does the choosing.
//
// v1. Subset sums instead of +-sums: they need no correction per plane, have the same 16-bit range, and padding columns, whose
// activations are 0, add nothing whatever their bits say. Cost grows with the weight's bits and not with the activations'.
#include "cpu.h"

#include <cstring>

#include "lookup.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kRows = LutWeight::kRows, kColumns = LutWeight::kColumns;

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

// All 16 entries at once: entry e is a constant vector of masks per column.
using Entries = std::int16_t __attribute__((vector_size(32)));
using EntryBytes = std::uint8_t __attribute__((vector_size(16)));

ANYBIT_INLINE void build_cell(const std::int8_t* x, std::uint8_t* low, std::uint8_t* high) {
  constexpr Entries chosen[4] = {{0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1},
                                 {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1},
                                 {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1},
                                 {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1}};
  Entries sum = Entries{} + static_cast<std::int16_t>(LutTables::kBias);
  for (size_t i = 0; i < 4; ++i) sum += chosen[i] & static_cast<std::int16_t>(x[i]);
  const auto lows = __builtin_convertvector(sum, EntryBytes), highs = __builtin_convertvector(sum >> 8, EntryBytes);
  std::memcpy(low, &lows, 16);
  std::memcpy(high, &highs, 16);
}

void build_tables(const std::int8_t* x, const LutWeight& w, LutTables* tables, std::int32_t* sums) {
  for (size_t c = 0; c < w.chunks(); ++c) {
    std::int8_t padded[kColumns] = {};
    const size_t left = w.columns - c * kColumns;
    const std::int8_t* columns = x + c * kColumns;
    if (left < kColumns) columns = static_cast<std::int8_t*>(std::memcpy(padded, columns, left));
#pragma GCC unroll 8
    for (size_t cell = 0; cell < LutTables::kCells; ++cell) {
      const size_t side = cell % 2, j = cell / 2;
      build_cell(columns + 4 * cell, tables[c].bytes[2 * side][j], tables[c].bytes[2 * side + 1][j]);
    }
  }
  for (size_t g = 0; g < w.groups; ++g) {
    std::int32_t sum = 0;
    for (size_t k = g * w.group_size; k < least((g + 1) * w.group_size, w.columns); ++k) sum += x[k];
    sums[g] = sum;
  }
}

// 16 rows of one group: biased sums to exact ones, then one fused multiply-add into y.
ANYBIT_INLINE void finish(const LutWeight& w, size_t block, size_t g, const Sums& sums, std::uint32_t bias, std::uint32_t x_sum,
                          float x_scale, std::int32_t* exact, float* y) {
  const size_t at = (block * w.groups + g) * kRows;
  for (size_t r = 0; r < kRows; ++r)
    exact[r] = static_cast<std::int32_t>(sums[r] - bias + static_cast<std::uint32_t>(w.offset[at + r]) * x_sum);
  if (!y) return;
  for (size_t r = 0; r < kRows; ++r) y[r] = __builtin_fmaf(static_cast<float>(exact[r]), w.scale[at + r] * x_scale, y[r]);
}

template <size_t R, size_t T>
void tile(const LutWeight& w, size_t block, const LutTokens& x, size_t m, const LutResults& results) {
  std::uint32_t coefficients = 0;
  for (size_t i = 0; i < w.bits; ++i) coefficients += static_cast<std::uint32_t>(w.coefficients[i]);
  float y[R][T][kRows] = {};
  for (size_t g = 0; g < w.groups; ++g) {
    const size_t first = g * w.group_size / kColumns;
    const size_t last = (least((g + 1) * w.group_size, w.columns) + kColumns - 1) / kColumns;
    const auto bias = static_cast<std::uint32_t>(LutTables::kBias * LutTables::kCells * (last - first)) * coefficients;
    Sums sums[R][T];
    look_up(w, block, x.tables + m * w.chunks(), first, last, sums);
    for (size_t i = 0; i < R * T; ++i) {
      const size_t r = i / T, t = i % T, n = (block + r) * kRows;
      std::int32_t exact[kRows];
      finish(w, block + r, g, sums[r][t], bias, static_cast<std::uint32_t>(x.sums[(m + t) * w.groups + g]),
             results.y ? x.scale[m + t] : 0.0f, exact, results.y ? y[r][t] : nullptr);
      if (!results.y)
        for (size_t row = 0; row < least(kRows, w.rows - n); ++row)
          results.integers[((m + t) * w.rows + n + row) * w.groups + g] = exact[row];
    }
  }
  if (!results.y) return;
  for (size_t i = 0; i < R * T; ++i) {
    const size_t n = (block + i / T) * kRows;
    for (size_t row = 0; row < least(kRows, w.rows - n); ++row) results.y[(m + i % T) * w.rows + n + row] = y[i / T][i % T][row];
  }
}

void linear_blocks(const LutWeight& w, const LutTokens& x, const LutResults& results, size_t begin, size_t end) {
  constexpr size_t kWide = kBlockTile, kNarrow = kBlockTile > kTokenTile ? kBlockTile / kTokenTile : 1;
  size_t m = 0;
  for (; kTokenTile > 1 && m + kTokenTile <= x.count; m += kTokenTile) {
    size_t block = begin;
    for (; block + kNarrow <= end; block += kNarrow) tile<kNarrow, kTokenTile>(w, block, x, m, results);
    for (; block < end; ++block) tile<1, kTokenTile>(w, block, x, m, results);
  }
  for (; m < x.count; ++m) {
    size_t block = begin;
    for (; block + kWide <= end; block += kWide) tile<kWide, 1>(w, block, x, m, results);
    for (; block < end; ++block) tile<1, 1>(w, block, x, m, results);
  }
}

}  // namespace

extern const LinearLutTable linear_lut_table = {kBlockTile, build_tables, linear_blocks};

}  // namespace anybit::ANYBIT_TARGET
