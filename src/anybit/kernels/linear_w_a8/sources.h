// Where the codes of a row block come from, 32 columns at a time: planes, planes of 2:4-sparse weights, or a strip of bytes that
// one of them left in the cache.
#pragma once

#include <utility>

namespace anybit::ANYBIT_TARGET {
namespace {

// Bytes ahead of use that a stream is asked for: with several streams the hardware's own guesses stop at every page. Measured.
constexpr size_t kPlanesAhead = 2048, kScaleAhead = 1024, kZeroAhead = 512;
constexpr size_t kQuads = 8;  // quads of columns in a chunk
alignas(64) constexpr std::uint8_t kZeros[TiledWeight::kBytes] = {};

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Lines that expand() is asked for: 2, 4 or 8; the missing ones are zero planes on top.
constexpr size_t lines_for(size_t bits) { return bits <= 2 ? 2 : bits <= 4 ? 4 : 8; }

// Codes of line `at` of B planes.
template <size_t B>
ANYBIT_INLINE void expand_line(const std::uint8_t* const (&plane)[B], size_t at, Codes (&out)[kQuads]) {
  constexpr size_t kLines = lines_for(B);
  const std::uint8_t* lines[kLines];
#pragma GCC unroll 8
  for (size_t p = 0; p < kLines; ++p) lines[p] = p < kLines - B ? kZeros : plane[p - (kLines - B)] + at * TiledWeight::kBytes;
  expand<kLines>(lines, out);
}

// Codes of a row block straight from B planes.
template <size_t B>
struct FromPlanes {
  static constexpr size_t kLines = lines_for(B);
  static constexpr bool kStreams = true, kSparse = false;
  const std::uint8_t* plane[B];

  ANYBIT_INLINE FromPlanes(const TiledWeight& w, size_t block) {
    for (size_t p = 0; p < B; ++p) plane[p] = w.planes + p * w.plane_bytes() + block * w.lines() * TiledWeight::kBytes;
  }
  ANYBIT_INLINE void load(size_t chunk, Codes (&out)[kQuads]) const {
#pragma GCC unroll 8
    for (size_t p = 0; p < B; ++p) __builtin_prefetch(plane[p] + chunk * TiledWeight::kBytes + kPlanesAhead);
    expand_line(plane, chunk, out);
  }
};

// The same of a 2:4-sparse weight: a line of kept codes is half a register for each of 16 quads, which the mask spreads.
template <size_t B>
struct FromPairs {
  static constexpr size_t kLines = lines_for(B);
  static constexpr bool kStreams = true, kSparse = true;
  const std::uint8_t* plane[B];
  const std::uint8_t* mask;

  ANYBIT_INLINE FromPairs(const TiledWeight& w, size_t block) : mask(w.mask + block * w.chunks() * TiledWeight::kBytes) {
    for (size_t p = 0; p < B; ++p) plane[p] = w.planes + p * w.plane_bytes() + block * w.lines() * TiledWeight::kBytes;
  }
  ANYBIT_INLINE void load(size_t chunk, Codes (&out)[kQuads]) const {
    __builtin_prefetch(mask + chunk * TiledWeight::kBytes + kPlanesAhead);
    chunk % 2 ? half<1>(chunk, out) : half<0>(chunk, out);
  }

 private:
  template <size_t kHalf>
  ANYBIT_INLINE void half(size_t chunk, Codes (&out)[kQuads]) const {
    if constexpr (kHalf == 0) {
#pragma GCC unroll 8
      for (size_t p = 0; p < B; ++p) __builtin_prefetch(plane[p] + chunk / 2 * TiledWeight::kBytes + kPlanesAhead);
    }
    Codes kept[kQuads];
    expand_line(plane, chunk / 2, kept);
    spread_all<kHalf>(kept, load_codes(mask + chunk * TiledWeight::kBytes), out, std::make_index_sequence<kQuads>{});
  }
  template <size_t kHalf, size_t... kQuad>
  ANYBIT_INLINE static void spread_all(const Codes (&kept)[kQuads], const Codes& marks, Codes (&out)[kQuads],
                                       std::index_sequence<kQuad...>) {
    ((out[kQuad] = spread<kQuad>(kept[kHalf * 4 + kQuad / 2], marks, 1 << (B - 1))), ...);
  }
};

// Codes of a row block expanded before: [chunks][8][64].
template <size_t L>
struct FromStrip {
  static constexpr size_t kLines = L;
  static constexpr bool kStreams = false;
  const std::uint8_t* codes;

  ANYBIT_INLINE void load(size_t chunk, Codes (&out)[kQuads]) const {
#pragma GCC unroll 8
    for (size_t q = 0; q < kQuads; ++q) out[q] = load_codes(codes + (chunk * kQuads + q) * 64);
  }
};

// Codes of a row block as bytes, an even number of chunks (the last may be zeros).
template <class Source>
void expand_strip(const TiledWeight& w, size_t block, std::uint8_t* strip) {
  const Source source(w, block);
  for (size_t chunk = 0; chunk < w.chunks(); ++chunk) {
    Codes codes[kQuads];
    source.load(chunk, codes);
    for (size_t q = 0; q < kQuads; ++q) store_codes(strip + (chunk * kQuads + q) * 64, codes[q]);
  }
  if (w.chunks() % 2) std::memset(strip + w.chunks() * 512, 0, 512);
}
using ExpandStrip = decltype(&expand_strip<FromPlanes<1>>);

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
