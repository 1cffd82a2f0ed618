// Prompts in the matrix unit (AMX): the same two products of a page as in cpu.cpp, in bfloat16 with float32 sums.
//
// Codes are exact in bfloat16, less half their range so that they are small; queries, weights and what a 16-bit cache holds are
// rounded. A row of a tile is summed by itself in an order that depends on nothing, so the bits do not depend on its neighbours.
#pragma once

#include <array>
#include <bit>

#include "product.h"
#include "softmax.h"

namespace anybit::ANYBIT_TARGET {
namespace {

using Half16 = std::uint16_t;
constexpr size_t kTile = 16, kStep = 32;  // rows and columns of sums; terms of one product
constexpr size_t kTileHalves = 512;

// What is taken off codes.
constexpr float centre(size_t bits) { return bits == 16 ? 0.0f : static_cast<float>(1 << (bits - 1)); }
template <class Codes>
constexpr float kCentre = std::is_same_v<Codes, Half> ? 0.0f : centre(8 / Codes::kRows);

struct TileSession {
  // rows: of sums, at most a tile's where there are no more than that.
  explicit TileSession(size_t rows) {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (size_t i = 0; i < 6 && rows < 16; ++i) config.rows[i] = static_cast<std::uint8_t>(rows);
    __asm__ volatile("ldtilecfg %0" : : "m"(config));  // not the intrinsic: gcc 12 drops the stores to `config`
  }
  ~TileSession() { _tile_release(); }  // tiles in use make every context switch save 8 KiB
};

// Terms 2k and 2k + 1 of 16 columns side by side, as the unit wants them.
template <class Codes>
ANYBIT_INLINE __m512i pair(Vec even, Vec odd) {
  if constexpr (!std::is_same_v<Codes, Half>)  // at most 8 bits: the upper half of a float has them all
    return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return _mm512_permutexvar_epi16((__m512i)(lane * 0x00010001 + (16 << 16)), halves);
}

// Codes of few bits, the lowest of 16-bit words, less their centre: the lookup sees five bits of a word, so the table repeats.
template <class Codes>
ANYBIT_INLINE __m512i small(Ints words) {
  alignas(64) static constexpr auto table = [] {
    std::array<Half16, 32> t{};
    for (size_t i = 0; i < 32; ++i)
      t[i] = static_cast<Half16>(std::bit_cast<std::uint32_t>(static_cast<float>(i % (1 << 8 / Codes::kRows)) - kCentre<Codes>) >> 16);
    return t;
  }();
  return _mm512_permutexvar_epi16((__m512i)words, _mm512_load_si512(table.data()));
}

// Codes [terms, columns] to tiles [columns / 16][terms / 32] of [16 pairs][16 columns][2]. Terms outside `seen` become zero where
// unused slots may hold NaN, and so do those that fill up the last tile.
template <class Codes>
void pack(const void* stored, size_t terms, size_t columns, Slots seen, std::ptrdiff_t ahead, Half16* tiles) {
  const size_t rows = terms / Codes::kRows, steps = (terms + kStep - 1) / kStep;
  const auto row = [&](size_t k, size_t column) {
    if (sizeof(typename Codes::Element) == 2 && (k < seen.begin || k >= seen.end)) return decltype(Codes::raw(nullptr)){};
    return Codes::raw(static_cast<const typename Codes::Element*>(stored) + k * columns + column);
  };
  for (size_t column = 0; column < columns; column += kTile, tiles += steps * kTileHalves) {
    for (size_t k = 0; k < rows; k += 2) {
      const auto even = row(k, column), odd = row(k + 1, column);
      const auto* here = static_cast<const typename Codes::Element*>(stored) + k * columns + column;
      if (column * sizeof *here % 64 == 0) fetch(here, ahead), fetch(here + columns, ahead);
      if constexpr (Codes::kRows > 1) {
        const Ints both = even | odd << 16;
#pragma GCC unroll 4
        for (size_t i = 0; i < Codes::kRows; ++i)
          _mm512_store_si512(tiles + (k + i * rows) * kTile, small<Codes>(both >> static_cast<int>(8 / Codes::kRows * i)));
      } else {
        _mm512_store_si512(tiles + k * kTile, pair<Codes>(Codes::value(even, 0) - kCentre<Codes>,
                                                          Codes::value(odd, 0) - kCentre<Codes>));
      }
    }
    std::memset(tiles + terms * kTile, 0, (steps * kStep - terms) * kTile * sizeof(Half16));
  }
}

// sums [32, 32 columns] += or = a [32, 32 steps] b, for `count` times 32 columns; strides in bytes. Without kBelow the upper 16
// rows alone, which are the same bits.
template <bool kBelow>
ANYBIT_INLINE void multiply(const Half16* a, size_t a_stride, const Half16* b, size_t steps, size_t count, bool add, float* sums,
                            size_t stride) {
  float* below = sums + kTile * stride / sizeof(float);
  const Half16* a_below = a + kTile * a_stride / sizeof(Half16);
  for (; count; --count, sums += 2 * kTile, below += 2 * kTile, b += 2 * steps * kTileHalves) {
    if (add) {
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + kTile, stride);
      if (kBelow) _tile_loadd(2, below, stride);
      if (kBelow) _tile_loadd(3, below + kTile, stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if (kBelow) _tile_zero(2);
      if (kBelow) _tile_zero(3);
    }
    for (size_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a + k * kStep, a_stride);
      _tile_loadd(6, b + k * kTileHalves, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + (steps + k) * kTileHalves, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (!kBelow) continue;
      _tile_loadd(5, a_below + k * kStep, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + kTile, stride);
    if (!kBelow) continue;
    _tile_stored(2, below, stride);
    _tile_stored(3, below + kTile, stride);
  }
}

// Weights as bfloat16, in the first half of their scores' place.
struct HalfWeights {
  // Scores may be above `peak` by this: weights of up to 256 are as good, and earlier pages need not be scaled all the time.
  static constexpr float kSlack = 5.5f;

  // exp(x - peak) within 5e-6 of it, exactly 0 below -88; 2^fraction by a polynomial that is 1 at 0.
  ANYBIT_INLINE static Vec power(Vec x, float peak) {
    constexpr float kLog2e = 1.44269504f;
    const Vec y = larger(fused(x, all(kLog2e), all(-peak * kLog2e)), all(-127.0f)), magic = all(0x1.8p23f);
    const Vec shifted = y + magic, r = y - (shifted - magic);
    Vec p = fused(r, all(0x1.3a02c4p-7f), all(0x1.c9fc4ap-5f));
    p = fused(p, r, all(0x1.ec0378p-3f));
    p = fused(p, r, all(0x1.62e12cp-1f));
    p = fused(p, r, all(1.0f));
    return (Vec)((Ints)p + ((Ints)shifted << 23));
  }
  ANYBIT_INLINE static float sum(Vec x) { return _mm512_reduce_add_ps((__m512)x); }
  ANYBIT_INLINE static void put(float* scores, size_t t, Vec weight) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(reinterpret_cast<Half16*>(scores) + t), (__m256i)_mm512_cvtneps_pbh((__m512)weight));
  }
};

// One block's scratch; rows and head_dim are filled up to whole tiles.
struct TileRows {
  const KvShape& shape;
  const Block& block;
  size_t group, count, padded, dim;
  Carry carry;
  float *peaks, *values, *scores, *bases;
  Half16 *q, *folded, *key_tiles, *value_tiles;

  TileRows(const KvShape& s, const Block& b, Scratch scratch)
      : shape(s), block(b), group(s.group()), count(b.count * group), padded((count + 2 * kTile - 1) / (2 * kTile) * 2 * kTile),
        dim((s.head_dim + kStep - 1) / kStep * kStep), carry(scratch, padded), peaks(scratch.take(padded)),
        values(scratch.take(padded * dim)), scores(scratch.take(padded * kPageTokens)), bases(scratch.take(padded)) {
    q = halves(scratch, padded * dim), folded = halves(scratch, padded * dim);
    key_tiles = halves(scratch, kPageTokens * dim), value_tiles = halves(scratch, kPageTokens * dim);
    std::memset(values, 0, padded * dim * sizeof(float));
    std::memset(q, 0, 2 * padded * dim * sizeof(Half16));  // and `folded` behind it
    for (size_t r = 0; r < count; ++r) peaks[r] = kNothing, load_query(r);
  }

  static Half16* halves(Scratch& scratch, size_t count) { return reinterpret_cast<Half16*>(scratch.take(count / 2)); }

  const float* query(size_t r) const {
    return block.q + (r / group * shape.heads + block.kv_head * group + r % group) * shape.head_dim;
  }

  void load_query(size_t r) {
    const float* from = query(r);
    Vec sum = {};
    for (size_t d = 0; d < shape.head_dim; d += kVec) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)load(from + d));
      _mm256_store_si256(reinterpret_cast<__m256i*>(q + r * dim + d), rounded);
      sum += (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
    }
    carry.sums[r] = _mm512_reduce_add_ps((__m512)sum);
  }
};

// With the scores' factor, and moved by the centre of the codes.
void load_centred_scales(const TileRows& rows, const Stored& page, Slots seen, float scaling) {
  float* scales = rows.carry.scales;
  load_scales(page, seen, scales);
  const float centres[2] = {page.shape.channels ? 0.0f : centre(page.shape.key_bits), centre(page.shape.value_bits)};
  for (size_t t = 0; t < kPageTokens; t += kVec)
    for (size_t i = 0; i < 2; ++i) {
      float *scale = scales + 2 * i * kPageTokens + t, *minimum = scale + kPageTokens;
      const float factor = i ? 1.0f : scaling;
      save(minimum, fused(load(scale), all(centres[i]), load(minimum)) * factor);
      save(scale, load(scale) * factor);
    }
}

// score_t = sum_c (q_c s_c) (code_tc - centre) + sum_c q_c (m_c + s_c centre), the products on the left in bfloat16.
void fold_in_tiles(const TileRows& rows, const Stored& page) {
  const size_t dim = rows.shape.head_dim;
  const Vec middle = all(centre(page.shape.key_bits));
  for (size_t r = 0; r < rows.count; ++r) {
    const float* q = rows.query(r);
    Vec base = {};
    for (size_t d = 0; d < dim; d += kVec) {
      float scale[kVec], minimum[kVec];
      halves(page.key_ranges + d, scale, kVec), halves(page.key_ranges + dim + d, minimum, kVec);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)(load(q + d) * load(scale)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(rows.folded + r * rows.dim + d), rounded);
      base = fused(load(q + d), fused(load(scale), middle, load(minimum)), base);
    }
    rows.bases[r] = _mm512_reduce_add_ps((__m512)base);
  }
}

using Packing = decltype(&pack<Half>);
constexpr Packing kPacking[] = {pack<Half>, pack<Byte>, pack<Nibble>, pack<Crumb>};
ANYBIT_INLINE Packing packing(size_t bits) { return kPacking[bits == 16 ? 0 : bits == 8 ? 1 : bits == 4 ? 2 : 3]; }

// What a page's scores need. Ranges lie behind all codes: fetched for the next page, too.
void prepare_keys(const TileRows& rows, size_t page, size_t next) {
  const Stored stored(rows.shape, rows.block.queries[0].pages[page], rows.block.kv_head);
  const Stored after(rows.shape, rows.block.queries[0].pages[next], rows.block.kv_head);
  for (size_t i = 0; i < after.shape.key_range_bytes() + after.shape.value_range_bytes(); i += 64)
    fetch(after.key_ranges, static_cast<std::ptrdiff_t>(i));
  if (stored.shape.channels) fold_in_tiles(rows, stored);
  const size_t dim = rows.shape.head_dim;
  packing(stored.shape.key_bits)(stored.keys, dim, kPageTokens, {0, dim}, after.keys - stored.keys, rows.key_tiles);
}

void prepare_values(const TileRows& rows, size_t page, size_t next, Slots seen) {
  const Stored stored(rows.shape, rows.block.queries[0].pages[page], rows.block.kv_head);
  const Stored after(rows.shape, rows.block.queries[0].pages[next], rows.block.kv_head);
  packing(stored.shape.value_bits)(stored.values, kPageTokens, rows.shape.head_dim, seen, after.values - stored.values,
                                   rows.value_tiles);
}

void soften_in_tiles(const TileRows& rows, const Stored& page, const Scoring& scoring, size_t index, Slots seen) {
  load_centred_scales(rows, page, seen, scoring.scaling);
  Carry carry = rows.carry;
  if (page.shape.channels) carry.sums = rows.bases;
  for (size_t r = 0; r < rows.count; ++r) {
    const Slots own = visible(rows.block.queries[r / rows.group], index);
    const float gain = soften<HalfWeights>(carry, r, own, scoring.softcap, rows.scores + r * kPageTokens, rows.peaks[r]);
    if (gain == 1.0f) continue;
    float* value = rows.values + r * rows.dim;
    for (size_t d = 0; d < rows.dim; d += kVec) save(value + d, load(value + d) * gain);
  }
}

// One page, whose keys are prepared. All rows take one step before any takes the next, and what comes between a step and the next
// does not need it: a tile that was just written would be waited for.
template <bool kBelow>
void attend_page_in_tiles(const TileRows& rows, const Scoring& scoring, size_t page, size_t last) {
  constexpr size_t kScoreBytes = kPageTokens * sizeof(float);
  const size_t dim = rows.dim, next = least(page + 1, last), later = least(page + 2, last);
  const Stored stored(rows.shape, rows.block.queries[0].pages[page], rows.block.kv_head);
  const Slots seen = visible_to_any(rows.block, 0, rows.block.count, page);
  const Half16* q = stored.shape.channels ? rows.folded : rows.q;
  for (size_t r = 0; r < rows.count; r += 2 * kTile)
    multiply<kBelow>(q + r * dim, dim * sizeof(Half16), rows.key_tiles, dim / kStep, kPageTokens / (2 * kTile), false,
                     rows.scores + r * kPageTokens, kScoreBytes);
  prepare_values(rows, page, next, seen);
  soften_in_tiles(rows, stored, scoring, page, seen);
  if (next != page) prepare_keys(rows, next, later);
  for (size_t r = 0; r < rows.count; r += 2 * kTile)
    multiply<kBelow>(reinterpret_cast<const Half16*>(rows.scores + r * kPageTokens), kScoreBytes, rows.value_tiles,
                     kPageTokens / kStep, dim / (2 * kTile), true, rows.values + r * dim, dim * sizeof(float));
}

void attend_split_in_tiles(const KvShape& shape, const Scoring& scoring, const Block& block, size_t split, float* states,
                           float* scratch) {
  const TileRows rows(shape, block, {scratch});
  const TileSession session(rows.count);
  const Pages pages(block, split);
  const auto attend_page = rows.count > kTile ? attend_page_in_tiles<true> : attend_page_in_tiles<false>;
  if (pages.begin < pages.end) prepare_keys(rows, pages.begin, least(pages.begin + 1, pages.end - 1));
  for (size_t page = pages.begin; page < pages.end; ++page)
    attend_page(rows, scoring, page, pages.end - 1);
  for (size_t r = 0; r < rows.count; ++r)
    rows.carry.leave<HalfWeights>(r, rows.peaks[r], rows.values + r * rows.dim, shape.head_dim, states + r * state_floats(shape));
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
