// AMX: 16 tokens x 16 rows in one instruction. A strip's chunk of codes already is a tile: row q holds four columns of 16 rows.
//
// A product takes 52 cycles but one can start every 16, so four sums are always under way: of four groups (whose sums become
// floats one batch later), or, when a row is one group (tiles_row.h), of 32 tokens x 32 rows.
#pragma once

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kTileTokens = 16;

// Columns that one tile product covers: a group must be whole products.
ANYBIT_INLINE size_t tile_columns(const TiledWeight& w) { return w.groups > 1 && w.group_size % 64 ? 32 : 64; }

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 codes.
struct TileSession {
  // `columns` of a product, for up to 16 tokens.
  TileSession(size_t columns, size_t tokens) {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 0, 0, 64, 64};
      std::uint8_t rows[16] = {};
    } config;
    for (size_t tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<std::uint8_t>(tokens);
    config.bytes[4] = config.bytes[5] = static_cast<std::uint16_t>(columns);
    config.rows[6] = config.rows[7] = static_cast<std::uint8_t>(columns / 4);
    // Not the intrinsic: gcc 12 takes it to read 8 bytes and drops the stores to the rest.
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileSession() { _tile_release(); }  // tiles in use make every context switch save 8 KiB
};

// Whether code - zero fits a signed byte: then zeros are subtracted in the strip and the epilogue has one step less, with the
// same result to the bit.
ANYBIT_INLINE bool can_center(const TiledWeight& w) {
  if (w.zero) return w.bits <= 7 && w.zero_mul == 1.0f && w.zero_add == 0.0f;
  const bool whole = w.zero_add == static_cast<float>(static_cast<int>(w.zero_add));
  return whole && (w.bits == 8 ? w.zero_add == 128.0f : w.zero_add >= 0.0f && w.zero_add <= 127.0f);
}

// Zeros of a group as they lie among codes: those of a row four times.
ANYBIT_INLINE __m512i group_zeros(const TiledWeight& w, size_t block, size_t group) {
  if (!w.zero) return _mm512_set1_epi8(static_cast<char>(static_cast<int>(w.zero_add)));
  const std::uint8_t* at = w.zero + (block * w.groups + group) * w.zero_bytes;
  const __m512i zero = _mm512_cvtepu8_epi32(w.zero_bytes == 8 ? sixteen_nibbles(at) : sixteen_bytes(at));
  return _mm512_shuffle_epi8(zero, _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0));
}

void center_strip(std::uint8_t* strip, const TiledWeight& w, size_t block) {
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    const __m512i zero = group_zeros(w, block, chunk / per_group);
    for (size_t q = 0; q < kQuads; ++q) {
      std::uint8_t* codes = strip + (chunk * kQuads + q) * 64;
      store_codes(codes, _mm512_sub_epi8(load_codes(codes), zero));
    }
  }
}

// Planes of the strip that is expanded after this one, asked for while this one is multiplied: otherwise the tiles stand still
// while memory is read. Of `turns` passes over the strip, pass `turn` asks for its share of the planes.
struct Ahead {
  const std::uint8_t* lines[8];
  const std::uint8_t* mask = nullptr;
  size_t count = 0, line_columns;

  Ahead(const TiledWeight& w, size_t block, size_t turn, size_t turns) : line_columns(w.line_columns()) {
    if (block >= w.row_blocks()) return;
    const std::uint8_t* at = w.planes + block * w.lines() * TiledWeight::kBytes;
    for (size_t plane = turn; plane < w.bits; plane += turns) lines[count++] = at + plane * w.plane_bytes();
    if (w.mask && turn == turns - 1) mask = w.mask + block * w.chunks() * TiledWeight::kBytes;
  }
  ANYBIT_INLINE void ask(size_t column) const {
    for (size_t i = 0; i < count; ++i) __builtin_prefetch(lines[i] + column / line_columns * TiledWeight::kBytes, 0, 2);
    if (mask) __builtin_prefetch(mask + column / TiledWeight::kColumns * TiledWeight::kBytes, 0, 2);
  }
};

#define ANYBIT_PRODUCT(sum, a, b, x_at, k)              \
  do {                                                  \
    _tile_loadd(a, (x_at) + (k), x.stride);             \
    _tile_loadd(b, strip + (k) * 16, 64);               \
    if constexpr (kCentred) _tile_dpbssd(sum, a, b);    \
    else _tile_dpbsud(sum, a, b);                       \
  } while (0)

// Products of the next group of 16 tokens x 16 rows into tile `sum`; the common group is one product.
#define ANYBIT_GROUP(sum, a, b)                                                     \
  do {                                                                              \
    _tile_zero(sum);                                                                \
    ANYBIT_PRODUCT(sum, a, b, xs, 0);                                               \
    if constexpr (!kOneProduct)                                                     \
      for (size_t k = step; k < w.group_size && xs + k < xs_end; k += step)         \
        ANYBIT_PRODUCT(sum, a, b, xs, k);                                           \
    xs += w.group_size, strip += 16 * w.group_size;                                 \
  } while (0)

// While one group leaves its tile, the products of the third after it start and the floats of the one before are added. A load
// that shares its low 12 address bits with a store still waiting for its product waits as well: hence the distance.
template <bool kCentred, bool kOneProduct, bool kSums>
void tile_groups(const std::uint8_t* strip, const TiledWeight& w, const Activations& x, const Output& out, size_t block,
                 size_t token, const Ahead& ahead) {
  const size_t lanes = least(TiledWeight::kRows, w.rows - block * TiledWeight::kRows), groups = w.groups;
  const std::int8_t* xs = x.codes + token * x.stride;
  [[maybe_unused]] const size_t step = tile_columns(w);
  [[maybe_unused]] const std::int8_t* xs_end = xs + w.columns;
  const float *x_scale = x.scale + token * groups, *x_sum = x.sums + token * groups;
  size_t table = block * groups;
  const bool whole = w.whole_zeros();
  alignas(2048) std::int32_t sums[2][256];
  Reals total[16];
#pragma GCC unroll 16
  for (size_t t = 0; t < 16; ++t) total[t] = splat(0.0f);
  const auto leave = [&](const std::int32_t* sum, size_t g) __attribute__((always_inline)) {
    if constexpr (kSums) {
      for (size_t t = 0; t < 16; ++t)
        std::memcpy(out.sums + ((token + t) * groups + g) * w.rows + block * TiledWeight::kRows, sum + 16 * t, 4 * lanes);
      return;
    }
    const Grid grid(w, table);
    const Ints middle = to_ints(grid.zero);
#pragma GCC unroll 16
    for (size_t t = 0; t < 16; ++t) {
      Ints whole_sum = _mm512_load_si512(sum + 16 * t);
      if (!kCentred && whole) whole_sum = subtract(whole_sum, middle, static_cast<std::int32_t>(x_sum[t * groups]));
      Reals real = to_reals(whole_sum);
      if (!kCentred && !whole) real = subtract(real, grid.zero, splat(x_sum[t * groups]));
      total[t] = fma(mul(grid.scale, splat(x_scale[t * groups])), real, total[t]);
    }
    ++table, ++x_scale, ++x_sum;
  };
  const std::uint8_t* next = ahead.count ? ahead.lines[0] : strip;
  const auto ask = [&]() __attribute__((always_inline)) {
    size_t k = 0;
    do {
      __builtin_prefetch(next, 0, 2);
      next += TiledWeight::kBytes, k += TiledWeight::kColumns;
    } while (k < w.group_size);
  };
  if constexpr (!kSums)
    for (size_t t = 0; t < 16; ++t) __builtin_prefetch(out.y + (token + t) * out.y_stride + block * TiledWeight::kRows, 1);
  ANYBIT_GROUP(0, 4, 6);
  if (groups > 1) ANYBIT_GROUP(1, 5, 7);
  if (groups > 2) ANYBIT_GROUP(2, 4, 6);
#define ANYBIT_STEP(now, next, a, b)              \
  if (g + 3 < groups) ANYBIT_GROUP(next, a, b);   \
  _tile_stored(now, sums[now % 2], 64);           \
  ask();                                          \
  if (g > 0) leave(sums[(now + 1) % 2], g - 1);   \
  if (++g == groups) break;
  size_t g = 0;
  for (;;) {
    ANYBIT_STEP(0, 3, 5, 7)
    ANYBIT_STEP(1, 0, 4, 6)
    ANYBIT_STEP(2, 1, 5, 7)
    ANYBIT_STEP(3, 2, 4, 6)
  }
#undef ANYBIT_STEP
  leave(sums[(groups - 1) % 2], groups - 1);
  if constexpr (!kSums)
#pragma GCC unroll 16
    for (size_t t = 0; t < 16; ++t) store(out.y + (token + t) * out.y_stride + block * TiledWeight::kRows, total[t], lanes);
}
#undef ANYBIT_GROUP

#undef ANYBIT_PRODUCT

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
#include "tiles_row.h"
namespace anybit::ANYBIT_TARGET {
namespace {

// Whole blocks of 16 tokens in [begin, end) for row blocks [first, last), several at a time: while their strips fit the
// first-level cache together, the activations come from the second level once for all of them. Returns where the rest begins.
size_t multiply_tiles(ExpandStrip expand, const TiledWeight& stored, const Activations& given, const Output& out, size_t first,
                      size_t last, size_t begin, size_t end, std::vector<std::uint8_t>& memory) {
  constexpr size_t kStrips = 4, kFirstLevel = 20 << 10;
  const size_t whole = begin + (end - begin) / kTileTokens * kTileTokens;
  if (whole == begin) return begin;
  const RowView view(stored, given, begin, whole);
  const TiledWeight& w = view.w;
  const Activations& x = view.x;
  const size_t bytes = strip_bytes(w);
  const size_t strips = w.groups == 1 ? 2 : bytes < kFirstLevel ? least(kStrips, kFirstLevel / bytes) : 1;
  const bool centred = stored.grain || (!out.sums && can_center(w)), one = w.group_size <= tile_columns(w);
  const auto by_group = out.sums ? tile_groups<false, false, true>
                        : !centred ? (one ? tile_groups<false, true, false> : tile_groups<false, false, false>)
                                   : (one ? tile_groups<true, true, false> : tile_groups<true, false, false>);
  const TileSession session(tile_columns(w), kTileTokens);
  std::uint8_t* strip = aligned(memory, strips * bytes);
  for (; first < last; first += strips) {
    const size_t stop = least(first + strips, last);
    for (size_t block = first; block < stop; ++block) {
      std::uint8_t* at = strip + (block - first) * bytes;
      expand(stored, block, at);
      if (stored.grain) expand_grains(stored, block, 0, at);
      else if (centred) center_strip(at, w, block);
    }
    if (w.groups == 1) {
      const RowTiles tiles{strip, stop - first == 2 ? bytes : 0, first, begin, whole};
      centred ? tile_rows<true>(tiles, stored, w, x, out) : tile_rows<false>(tiles, stored, w, x, out);
      continue;
    }
    for (size_t token = begin; token < whole; token += kTileTokens)
      for (size_t block = first; block < stop; ++block) {
        const Ahead ahead(w, block + strips, (token - begin) / kTileTokens, (whole - begin) / kTileTokens);
        by_group(strip + (block - first) * bytes, w, x, out, block, token, ahead);
      }
  }
  return whole;
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
