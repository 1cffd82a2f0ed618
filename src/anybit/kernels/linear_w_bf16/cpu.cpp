// Planes to bfloat16 tiles, once per 32 rows, then 32 tokens x 32 rows at a time in the matrix unit (AMX).
//
// The integer kernel has to leave the unit after every group to apply a scale; here scales are in the weights, so that sums stay
// inside for the whole row. The price is one rounding of weights and activations to bfloat16.
#include "cpu.h"

#include <vector>

#include "primitives.h"
#if defined(ANYBIT_TARGET_amx)
#include "linear_w_a8/vector_avx512.h"
#endif

namespace anybit::ANYBIT_TARGET {
namespace {

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

ANYBIT_INLINE std::uint16_t to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // stays a NaN
  return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

void round_row(const float* x, const HalfActivations& out, size_t t) {
  const size_t padded = (out.columns + 31) / 32 * 32;
  std::uint16_t* to = out.values + t * out.stride;
  size_t k = 0;
#if defined(ANYBIT_TARGET_amx)
  for (; k + 16 <= out.columns; k += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
#endif
  for (; k < out.columns; ++k) to[k] = to_bf16(x[k]);
  for (; k < padded; ++k) to[k] = 0;
}

#if defined(ANYBIT_TARGET_amx)

constexpr size_t kTile = 16, kStep = 32;  // tokens or rows of a tile; columns of one product
constexpr size_t kChunkBytes = 1024;      // 32 columns of 16 rows
constexpr size_t kPanel = 320, kPanelled = 640;  // columns of a panel; rows longer than that gain nothing by panels (NOTES.md)

// Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights; the second 16 tokens may be fewer, or none.
void configure(size_t tokens, size_t more) {
  struct alignas(64) {
    std::uint8_t palette = 1, start = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {};
  } config;
  const size_t other = more ? more : tokens;
  const size_t rows[8] = {tokens, tokens, other, other, tokens, other, kTile, kTile};
  for (int tile = 0; tile < 8; ++tile) config.rows[tile] = static_cast<std::uint8_t>(rows[tile]);
  __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

// Column j of each quad as float: 16 rows.
template <int j>
ANYBIT_INLINE Reals column(Codes codes, Reals scale, Reals shift) {
  const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(codes, 8 * j), _mm512_set1_epi32(255));
  return fma(scale, _mm512_cvtepi32_ps(byte), shift);
}

// Two columns of 16 rows, side by side in every row's lane.
ANYBIT_INLINE __m512i pair(Reals even, Reals odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // 16 of even, then 16 of odd
  const __m512i interleave = _mm512_add_epi16(
      _mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                                      _mm512_set1_epi32(0x00010001)));
  return _mm512_permutexvar_epi16(interleave, halves);
}

// A row block as bfloat16: [chunks][16 pairs of columns][16 rows][2].
template <size_t B>
void decode_strip(const TiledWeight& w, size_t block, std::uint8_t* strip) {
  constexpr size_t kLines = B <= 2 ? 2 : B <= 4 ? 4 : 8;
  alignas(64) static constexpr std::uint8_t kZeros[TiledWeight::kBytes] = {};
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  Reals scale = splat(0.0f), shift = scale;
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk % per_group == 0) {
      const size_t at = block * w.groups + chunk / per_group;
      scale = mul(load_halves(w.scale + at * TiledWeight::kRows), splat(w.scale_mul));
      Reals zero = splat(w.zero_add);
      const std::uint8_t* zeros = w.zero + at * w.zero_bytes;
      if (w.zero) zero = fma(w.zero_bytes == 8 ? load_nibbles(zeros) : load_bytes(zeros), splat(w.zero_mul), zero);
      shift = mul(mul(scale, zero), splat(-1.0f));
    }
    const std::uint8_t* lines[kLines];
    for (size_t p = 0; p < kLines; ++p)
      lines[p] = p < kLines - B ? kZeros
                                : w.planes + (p - (kLines - B)) * w.plane_bytes() + (block * chunks + chunk) * TiledWeight::kBytes;
    Codes codes[8];
    expand<kLines>(lines, codes);
#pragma GCC unroll 8
    for (size_t q = 0; q < 8; ++q) {
      std::uint8_t* to = strip + chunk * kChunkBytes + q * 128;
      _mm512_store_si512(to, pair(column<0>(codes[q], scale, shift), column<1>(codes[q], scale, shift)));
      _mm512_store_si512(to + 64, pair(column<2>(codes[q], scale, shift), column<3>(codes[q], scale, shift)));
    }
  }
}

using Sums = float[4][256];  // 16 tokens x rows 0 .. 15, the same x rows 16 .. 31, the next 16 tokens

// Columns [begin, end) of up to 32 tokens (16 and `more`) x 32 rows, added to what `sums` holds unless they are the first. The
// result goes back there, or straight to `y`: reading a tile back soon after its store would wait for it.
ANYBIT_INLINE void multiply(const std::uint8_t* strip, size_t apart, const HalfActivations& x, size_t token, size_t more,
                            size_t begin, size_t end, Sums& sums, float* y, size_t y_stride) {
  if (begin == 0) {
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
  const std::uint16_t *first = x.values + token * x.stride, *second = first + kTile * x.stride;
  strip += begin / kStep * kChunkBytes;
  for (size_t k = begin; k < end; k += kStep, strip += kChunkBytes) {
    _tile_loadd(4, first + k, x.stride * 2);
    _tile_loadd(6, strip, 64);
    _tile_loadd(7, strip + apart, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (!more) continue;
    _tile_loadd(5, second + k, x.stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  float* to[4] = {sums[0], sums[1], sums[2], sums[3]};
  if (y) to[0] = y, to[1] = y + kTile, to[2] = y + kTile * y_stride, to[3] = to[2] + kTile;
  const size_t stride = y ? y_stride * sizeof(float) : 64;
  _tile_stored(0, to[0], stride);
  _tile_stored(1, to[1], stride);
  if (!more) return;
  _tile_stored(2, to[2], stride);
  _tile_stored(3, to[3], stride);
}

ANYBIT_INLINE void copy_out(const Sums& sums, const TiledWeight& w, float* y, size_t y_stride, size_t block, size_t count) {
  for (size_t i = 0; i < 2 && (block + i) * kTile < w.rows; ++i) {
    const size_t bytes = least(w.rows - (block + i) * kTile, kTile) * sizeof(float);
    for (size_t t = 0; t < count; ++t)
      std::memcpy(y + t * y_stride + (block + i) * kTile, sums[i + t / kTile * 2] + t % kTile * kTile, bytes);
  }
}

// A pair of row blocks for all tokens, a panel of columns at a time, so that the panel's weights stay in the first-level cache
// while the tokens pass by.
void multiply_tokens(const std::uint8_t* strip, size_t apart, const TiledWeight& w, const HalfActivations& x, float* y,
                     size_t y_stride, size_t block) {
  static thread_local std::vector<float> memory;
  const size_t token_blocks = (x.tokens + 2 * kTile - 1) / (2 * kTile), panels = x.columns > kPanelled ? 1 : (x.columns + kPanel - 1) / kPanel;
  if (memory.size() < token_blocks * 1024 + 16) memory.resize(token_blocks * 1024 + 16);
  auto* sums = reinterpret_cast<Sums*>(memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64 / 4);
  const size_t panel = (x.columns + panels * kStep - 1) / (panels * kStep) * kStep;
  size_t configured = 0;
  for (size_t begin = 0; begin < x.columns; begin += panel)
    for (size_t token = 0; token < x.tokens; token += 2 * kTile) {
      const size_t count = least(x.tokens - token, 2 * kTile), more = count > kTile ? count - kTile : 0;
      if (count != configured) configure(least(count, kTile), more), configured = count;
      Sums& at = sums[token / (2 * kTile)];
      const bool last = begin + panel >= x.columns, whole = (block + 2) * kTile <= w.rows;
      float* to = y + token * y_stride + block * kTile;
      multiply(strip, apart, x, token, more, begin, least(begin + panel, x.columns), at, last && whole ? to : nullptr, y_stride);
      if (last && !whole) copy_out(at, w, y + token * y_stride, y_stride, block, count);
    }
}

template <size_t B>
void run_width(const TiledWeight& w, const HalfActivations& x, float* y, size_t y_stride, size_t first, size_t last) {
  static thread_local std::vector<std::uint8_t> memory;
  const size_t bytes = w.chunks() * kChunkBytes;
  if (memory.size() < 2 * bytes + 64) memory.resize(2 * bytes + 64);
  std::uint8_t* strip = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
  for (size_t block = first; block < last; block += 2) {
    decode_strip<B>(w, block, strip);
    const bool two = block + 1 < last;
    if (two) decode_strip<B>(w, block + 1, strip + bytes);
    multiply_tokens(strip, two ? bytes : 0, w, x, y, y_stride, block);
  }
  _tile_release();
}

void run_blocks(const TiledWeight& w, const HalfActivations& x, float* y, size_t y_stride, size_t first, size_t last) {
  constexpr decltype(&run_width<1>) by_width[] = {run_width<1>, run_width<2>, run_width<3>, run_width<4>,
                                                  run_width<5>, run_width<6>, run_width<7>, run_width<8>};
  by_width[w.bits - 1](w, x, y, y_stride, first, last);
}

#else
constexpr decltype(LinearBf16TilesTable::run_blocks) run_blocks = nullptr;
#endif

}  // namespace

extern const LinearBf16TilesTable linear_w_bf16_table = {run_blocks, round_row};

}  // namespace anybit::ANYBIT_TARGET
