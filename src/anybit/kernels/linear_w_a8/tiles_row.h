// AMX where a row is one group: 32 tokens x 32 rows at a time, so that each tile fetched serves two products.
//
// Columns go in panels: the codes of a panel stay in the first-level cache while the tokens pass by, and activations alone come from
// the second. Between panels sums wait in memory, as integers.
#pragma once

#include <vector>

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kPanel = 512, kOnePanel = 768;  // columns of a panel; rows up to kOnePanel are not cut

struct RowTiles {
  const std::uint8_t* strip;  // codes of one row block, those of the next `apart` bytes further: 0 if there is none
  size_t apart, block, begin, end;  // tokens [begin, end), whole blocks of 16
};

using TileSums = std::int32_t[4][256];  // 16 tokens x rows 0 .. 15, the same x rows 16 .. 31, the next 16 tokens

#define ANYBIT_TILE(sum, a, b)                  \
  do {                                          \
    if constexpr (kCentred) _tile_dpbssd(sum, a, b); \
    else _tile_dpbsud(sum, a, b);               \
  } while (0)

// Columns [from, to) of up to 32 tokens: added to `sums` unless they are the first.
template <bool kCentred, class Ask>
ANYBIT_INLINE void tile_panel(const std::uint8_t* strip, size_t apart, const std::int8_t* xs, size_t next, size_t stride, size_t from,
                              size_t to, TileSums& sums, Ask&& ask) {
  if (from == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums[0], 64);
    _tile_loadd(1, sums[1], 64);
    _tile_loadd(2, sums[2], 64);
    _tile_loadd(3, sums[3], 64);
  }
  for (size_t k = from; k < to; k += 64) {
    _tile_loadd(4, xs + k, stride);
    _tile_loadd(6, strip + k * 16, 64);
    ANYBIT_TILE(0, 4, 6);
    _tile_loadd(7, strip + apart + k * 16, 64);
    ANYBIT_TILE(1, 4, 7);
    _tile_loadd(5, xs + next + k, stride);
    ANYBIT_TILE(2, 5, 6);
    ANYBIT_TILE(3, 5, 7);
    ask(k);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
}
#undef ANYBIT_TILE

// Sums of one row block for `count` <= 16 tokens from `token`, as floats or as they are.
template <bool kCentred>
ANYBIT_INLINE void leave_rows(const std::int32_t* sums, const TiledWeight& w, const Activations& x, const Output& out, size_t block,
                              size_t token) {
  const size_t first = block * TiledWeight::kRows, lanes = least(TiledWeight::kRows, w.rows - first);
  const Grid grid = out.sums ? Grid{splat(0.0f), splat(0.0f)} : Grid(w, block, 0);
  const bool whole = w.whole_zeros();
  for (size_t t = 0; t < kTileTokens; ++t) {
    const Ints sum = _mm512_load_si512(sums + 16 * t);
    if (out.sums) {
      store(out.sums + (token + t) * w.rows + first, sum, lanes);
      continue;
    }
    const float x_scale = x.scale[token + t], x_sum = kCentred ? 0.0f : x.sums[token + t];
    const Reals total = kCentred ? fma(mul(grid.scale, splat(x_scale)), to_reals(sum), splat(0.0f))
                        : whole  ? grid.add_whole(splat(0.0f), sum, x_scale, x_sum)
                                 : grid.add_to(splat(0.0f), sum, x_scale, x_sum);
    store(out.y + (token + t) * out.y_stride + first, total, lanes);
  }
}

// `w` is `stored`, or what its strips make of it; planes of the strips to come are asked for meanwhile.
template <bool kCentred>
void tile_rows(const RowTiles& tiles, const TiledWeight& stored, const TiledWeight& w, const Activations& x, const Output& out) {
  constexpr size_t kTokens = 2 * kTileTokens;
  static thread_local std::vector<std::uint8_t> memory;
  const size_t tokens = tiles.end - tiles.begin, passes = (tokens + kTokens - 1) / kTokens;
  auto* sums = reinterpret_cast<TileSums*>(aligned(memory, passes * sizeof(TileSums)));
  const size_t panels = w.columns > kOnePanel ? (w.columns + kPanel - 1) / kPanel : 1;
  const size_t panel = (w.columns + panels * 64 - 1) / (panels * 64) * 64;
  for (size_t from = 0; from < w.columns; from += panel)
    for (size_t pass = 0; pass < passes; ++pass) {
      const size_t token = tiles.begin + pass * kTokens, to = least(from + panel, w.columns);
      const Ahead low(stored, tiles.block + 2, pass, passes), high(stored, tiles.block + 3, pass, passes);
      const size_t next = token + kTileTokens < tiles.end ? kTileTokens * x.stride : 0;
      tile_panel<kCentred>(tiles.strip, tiles.apart, x.codes + token * x.stride, next, x.stride, from, to, sums[pass], [&](size_t k) {
        low.ask(k), low.ask(k + 32), high.ask(k), high.ask(k + 32);
      });
    }
  for (size_t pass = 0; pass < passes; ++pass)
    for (size_t i = 0; i < 4; ++i) {
      const size_t token = tiles.begin + pass * kTokens + i / 2 * kTileTokens;
      if (token < tiles.end && (i % 2 == 0 || tiles.apart)) leave_rows<kCentred>(sums[pass][i], w, x, out, tiles.block + i % 2, token);
    }
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
