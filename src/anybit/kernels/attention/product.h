// C [rows, columns] = gain * C + A [rows, K] B [K, columns], B stored as codes: scores (A queries, B keys) and weighted values.
#pragma once

#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

struct Product {
  const float* a;
  size_t a_stride;
  const void* b;
  size_t columns;      // of B and C
  size_t step;         // rows of B between those that share bytes
  size_t begin, end;   // stored rows of B
  const float* gain;   // [rows], or null: C starts at 0
  float* c;
  size_t c_stride;
  std::ptrdiff_t ahead;  // bytes from B to what is multiplied next, fetched meanwhile
};

// A page is too short a run, and the next one too far away, for the hardware to foresee.
ANYBIT_INLINE void fetch(const void* p, std::ptrdiff_t ahead) { __builtin_prefetch(static_cast<const char*>(p) + ahead, 0, 2); }

// Columns [column, column + V * kVec) of R rows. Each element adds up its terms one by one in the order of the stored rows.
template <class Codes, size_t R, size_t V>
void tile(const Product& p, size_t row, size_t column) {
  using Element = typename Codes::Element;
  const float* a = p.a + row * p.a_stride;
  float* c = p.c + row * p.c_stride + column;
  Vec sums[R][V];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < V; ++v) sums[r][v] = p.gain ? load(c + r * p.c_stride + v * kVec) * p.gain[row + r] : Vec{};
  for (size_t k = p.begin; k < p.end; ++k) {
    const Element* b = static_cast<const Element*>(p.b) + k * p.columns + column;
    if constexpr (sizeof(Element) < 4)
      for (size_t i = 0; i < V * kVec * sizeof(Element); i += 64) fetch(b, p.ahead + static_cast<std::ptrdiff_t>(i));
#pragma GCC unroll 8
    for (size_t i = 0; i < Codes::kRows; ++i) {
      Vec x[V];
#pragma GCC unroll 8
      for (size_t v = 0; v < V; ++v) {
        if constexpr (sizeof(Element) == 4)
          x[v] = load(b + i * p.step * p.columns + v * kVec);
        else
          x[v] = Codes::value(Codes::raw(b + v * kVec), i);
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < R; ++r) {
        const Vec factor = all(a[r * p.a_stride + k + i * p.step]);
#pragma GCC unroll 8
        for (size_t v = 0; v < V; ++v) sums[r][v] = fused(factor, x[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (size_t v = 0; v < V; ++v) save(c + r * p.c_stride + v * kVec, sums[r][v]);
}

template <class Codes, size_t V>
ANYBIT_INLINE void tile_rows(const Product& p, size_t rows, size_t column) {
  constexpr decltype(&tile<Codes, 1, V>) by_rows[kTileRows] = {tile<Codes, 1, V>, tile<Codes, 2, V>, tile<Codes, 3, V>,
                                                               tile<Codes, 4, V>, tile<Codes, 5, V>, tile<Codes, 6, V>};
  for (size_t row = 0, tiles = (rows + kTileRows - 1) / kTileRows; tiles; --tiles) {
    const size_t share = (rows - row) / tiles;  // even tiles: a tile of one or two rows cannot hide the latency of an fma
    by_rows[share - 1](p, row, column);
    row += share;
  }
}

// The first `columns` columns, a multiple of 16. Columns outside: a panel of B stays in the first-level cache for all rows.
template <class Codes>
void multiply(const Product& p, size_t rows, size_t columns) {
  constexpr size_t kWide = kTileVecs * kVec;
  size_t column = 0;
  for (; column + kWide <= columns; column += kWide) tile_rows<Codes, kTileVecs>(p, rows, column);
  for (; column < columns; column += kVec) tile_rows<Codes, 1>(p, rows, column);
}

// Stored rows [begin, end) of B to floats, for many rows of A.
template <class Codes>
void convert(const Product& p, size_t columns, float* out) {
  for (size_t k = p.begin; k < p.end; ++k)
    for (size_t column = 0; column < columns; column += kVec) {
      const auto* b = static_cast<const typename Codes::Element*>(p.b) + k * p.columns + column;
      const auto raw = Codes::raw(b);
      fetch(b, p.ahead);
#pragma GCC unroll 4
      for (size_t i = 0; i < Codes::kRows; ++i) save(out + (k + i * p.step) * p.columns + column, Codes::value(raw, i));
    }
}

// Few rows multiply codes as they come, even in two tiles; for many, the codes are converted once. The additions and their order
// are the same.
constexpr size_t kDirectRows = 8;

template <class Codes>
void multiply_codes(Product p, size_t rows, size_t columns, float* floats) {
  if (rows <= kDirectRows) return multiply<Codes>(p, rows, columns);
  convert<Codes>(p, columns, floats);
  p.b = floats;
  multiply<Converted<Codes>>(p, rows, columns);
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
