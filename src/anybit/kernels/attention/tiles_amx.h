// Prompts in the matrix unit (AMX): the same two products of a page as in cpu.cpp, in bfloat16 with float32 sums.
//
// Codes are exact in bfloat16, less half their range so that they are small; queries, weights and what a 16-bit cache holds are
// rounded. A row of a tile is summed by itself in an order that depends on nothing, so the bits do not depend on its neighbours.
#pragma once

#include "softmax.h"

namespace anybit::ANYBIT_TARGET {
namespace {

using Half16 = std::uint16_t;
constexpr size_t kTile = 16, kStep = 32;  // rows and columns of sums; terms of one product
constexpr size_t kTileHalves = 512;

template <class Codes>
constexpr float kCentre = std::is_same_v<Codes, Byte> ? 128.0f : std::is_same_v<Codes, Nibble> ? 8.0f : 0.0f;

struct TileSession {
  TileSession() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
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

// Codes [terms, columns] to tiles [columns / 16][terms / 32] of [16 pairs][16 columns][2]. Terms outside `seen` become zero where
// unused slots may hold NaN, and so do those that fill up the last tile.
template <class Codes>
void pack(const void* stored, size_t terms, size_t columns, Slots seen, Half16* tiles) {
  const size_t rows = terms / Codes::kRows, steps = (terms + kStep - 1) / kStep;
  const auto row = [&](size_t k, size_t column) {
    if (sizeof(typename Codes::Element) == 2 && (k < seen.begin || k >= seen.end)) return decltype(Codes::raw(nullptr)){};
    return Codes::raw(static_cast<const typename Codes::Element*>(stored) + k * columns + column);
  };
  for (size_t column = 0; column < columns; column += kTile, tiles += steps * kTileHalves) {
    for (size_t k = 0; k < rows; k += 2) {
      const auto even = row(k, column), odd = row(k + 1, column);
#pragma GCC unroll 2
      for (size_t i = 0; i < Codes::kRows; ++i)
        _mm512_store_si512(tiles + (k + i * rows) * kTile, pair<Codes>(Codes::value(even, i) - kCentre<Codes>,
                                                                       Codes::value(odd, i) - kCentre<Codes>));
    }
    std::memset(tiles + terms * kTile, 0, (steps * kStep - terms) * kTile * sizeof(Half16));
  }
}

// sums [32, 32 columns] += or = a [32, 32 steps] b, for `count` times 32 columns; strides in bytes.
ANYBIT_INLINE void multiply(const Half16* a, size_t a_stride, const Half16* b, size_t steps, size_t count, bool add, float* sums,
                            size_t stride) {
  float* below = sums + kTile * stride / sizeof(float);
  const Half16* a_below = a + kTile * a_stride / sizeof(Half16);
  for (; count; --count, sums += 2 * kTile, below += 2 * kTile, b += 2 * steps * kTileHalves) {
    if (add) {
      _tile_loadd(0, sums, stride);
      _tile_loadd(1, sums + kTile, stride);
      _tile_loadd(2, below, stride);
      _tile_loadd(3, below + kTile, stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (size_t k = 0; k < steps; ++k) {
      _tile_loadd(4, a + k * kStep, a_stride);
      _tile_loadd(6, b + k * kTileHalves, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + (steps + k) * kTileHalves, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a_below + k * kStep, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + kTile, stride);
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
  float *peaks, *values, *scores;
  Half16 *q, *key_tiles, *value_tiles;

  TileRows(const KvShape& s, const Block& b, Scratch scratch)
      : shape(s), block(b), group(s.group()), count(b.count * group), padded((count + 2 * kTile - 1) / (2 * kTile) * 2 * kTile),
        dim((s.head_dim + kStep - 1) / kStep * kStep), carry(scratch, padded), peaks(scratch.take(padded)),
        values(scratch.take(padded * dim)), scores(scratch.take(padded * kPageTokens)) {
    q = halves(scratch, padded * dim), key_tiles = halves(scratch, kPageTokens * dim), value_tiles = halves(scratch, kPageTokens * dim);
    std::memset(values, 0, padded * dim * sizeof(float));
    std::memset(q, 0, padded * dim * sizeof(Half16));
    for (size_t r = 0; r < count; ++r) peaks[r] = kNothing, load_query(r);
  }

  static Half16* halves(Scratch& scratch, size_t count) { return reinterpret_cast<Half16*>(scratch.take(count / 2)); }

  void load_query(size_t r) {
    const float* from = block.q + (r / group * shape.heads + block.kv_head * group + r % group) * shape.head_dim;
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
template <class Codes>
ANYBIT_INLINE void load_centred_scales(const TileRows& rows, const std::uint8_t* stored, Slots seen, float scaling) {
  float* scales = rows.carry.scales;
  load_scales(rows.shape, stored, seen, scales);
  for (size_t t = 0; t < kPageTokens; t += kVec)
    for (size_t i : {size_t{0}, size_t{2}}) {
      float *scale = scales + i * kPageTokens + t, *minimum = scale + kPageTokens;
      const float factor = i ? 1.0f : scaling;
      save(minimum, fused(load(scale), all(kCentre<Codes>), load(minimum)) * factor);
      save(scale, load(scale) * factor);
    }
}

template <class Codes>
void attend_page_in_tiles(const TileRows& rows, const Scoring& scoring, size_t page) {
  const Block& block = rows.block;
  const Slots seen = visible_to_any(block, 0, block.count, page);
  if (seen.empty()) return;
  const KvShape& shape = rows.shape;
  const std::uint8_t* keys = block.queries[0].pages[page] + block.kv_head * shape.head_bytes();
  const std::uint8_t* values = keys + shape.code_bytes();
  load_centred_scales<Codes>(rows, values + shape.code_bytes(), seen, scoring.scaling);
  pack<Codes>(keys, shape.head_dim, kPageTokens, {0, shape.head_dim}, rows.key_tiles);
  pack<Codes>(values, kPageTokens, shape.head_dim, seen, rows.value_tiles);
  // All rows take one step before any takes the next: a tile that was just written would be waited for.
  constexpr size_t kScoreBytes = kPageTokens * sizeof(float);
  const size_t dim = rows.dim;
  for (size_t r = 0; r < rows.count; r += 2 * kTile)
    multiply(rows.q + r * dim, dim * sizeof(Half16), rows.key_tiles, dim / kStep, kPageTokens / (2 * kTile), false,
             rows.scores + r * kPageTokens, kScoreBytes);
  for (size_t r = 0; r < rows.count; ++r) {
    const Slots own = visible(block.queries[r / rows.group], page);
    const float gain = soften<HalfWeights>(rows.carry, r, own, scoring.softcap, rows.scores + r * kPageTokens, rows.peaks[r]);
    if (gain == 1.0f) continue;
    float* value = rows.values + r * dim;
    for (size_t d = 0; d < dim; d += kVec) save(value + d, load(value + d) * gain);
  }
  for (size_t r = 0; r < rows.count; r += 2 * kTile)
    multiply(reinterpret_cast<const Half16*>(rows.scores + r * kPageTokens), kScoreBytes, rows.value_tiles, kPageTokens / kStep,
             dim / (2 * kTile), true, rows.values + r * dim, dim * sizeof(float));
}

void attend_split_in_tiles(const KvShape& shape, const Scoring& scoring, const Block& block, size_t split, float* states,
                           float* scratch) {
  const TileSession session;
  const TileRows rows(shape, block, {scratch});
  const auto attend_page = shape.bits == 16  ? attend_page_in_tiles<Half>
                           : shape.bits == 8 ? attend_page_in_tiles<Byte>
                                             : attend_page_in_tiles<Nibble>;
  const Pages pages(block, split);
  for (size_t page = pages.begin; page < pages.end; ++page) attend_page(rows, scoring, page);
  for (size_t r = 0; r < rows.count; ++r)
    rows.carry.leave<HalfWeights>(r, rows.peaks[r], rows.values + r * rows.dim, shape.head_dim, states + r * state_floats(shape));
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
