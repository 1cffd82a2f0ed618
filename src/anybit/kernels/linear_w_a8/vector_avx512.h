// AVX-512 with VNNI and GFNI: one register is 16 rows.
#pragma once

#include <immintrin.h>

#include "linear_w_a8/places.h"

namespace anybit::ANYBIT_TARGET {

using Codes = __m512i;
using Ints = __m512i;
using Reals = __m512;

// GF2P8AFFINEQB multiplies the 8x8 bit matrix in each quadword by a byte: with the planes of eight codes as its rows and
// powers of two as the bytes, it transposes planes into codes (row 0, the most significant plane, lands in bit 7).
ANYBIT_INLINE __m512i transpose_bits(__m512i matrix) {
  return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(static_cast<long long>(0x8040201008040201u)), matrix, 0);
}
// (byte >> shift) & (2^bits - 1) in one instruction: row 7 - i of the constant matrix picks bit i + shift.
template <int bits, int shift>
ANYBIT_INLINE __m512i field(__m512i v) {
  std::uint64_t matrix = 0;
  for (int i = 0; i < bits; ++i) matrix |= std::uint64_t{1} << (i + shift) << (8 * (7 - i));
  return _mm512_gf2p8affine_epi64_epi8(v, _mm512_set1_epi64(static_cast<long long>(matrix)), 0);
}
ANYBIT_INLINE __m512i line(const std::uint8_t* p) { return _mm512_loadu_si512(p); }

// Bytes of the planes are interleaved until every quadword holds whole codes: 8 planes of one byte, 4 of two or 2 of four.
// With the byte index in a 16-byte lane written i3 i2 i1 i0 (quad i3 i2 i1, row pair i0), each unpack moves one selector bit
// in at its width and pushes the top one out into the choice of low or high half.
constexpr bool kPairs = true;  // whether registers hold the sums of two row blocks for six tokens

template <size_t P>
ANYBIT_INLINE void expand(const std::uint8_t* const* lines, Codes (&out)[8]) {
  if constexpr (P == 2) {
    const __m512i a = line(lines[0]), b = line(lines[1]);
    const __m512i lo = _mm512_unpacklo_epi8(a, b), hi = _mm512_unpackhi_epi8(a, b);        // i2 i1 i0 p
    const __m512i c = _mm512_unpacklo_epi16(lo, hi), d = _mm512_unpackhi_epi16(lo, hi);    // i1 i0 i3 p
    const __m512i u = transpose_bits(_mm512_unpacklo_epi32(c, d));                         // i0 i2 i3 p, i1 = 0
    const __m512i v = transpose_bits(_mm512_unpackhi_epi32(c, d));                         // i1 = 1
    out[0] = field<2, 6>(u), out[4] = field<2, 4>(u), out[2] = field<2, 2>(u), out[6] = field<2, 0>(u);
    out[1] = field<2, 6>(v), out[5] = field<2, 4>(v), out[3] = field<2, 2>(v), out[7] = field<2, 0>(v);
  } else if constexpr (P == 4) {
    const __m512i a = line(lines[0]), b = line(lines[1]), c = line(lines[2]), d = line(lines[3]);
    const __m512i halves[2][2] = {{_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d)},
                                  {_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d)}};
#pragma GCC unroll 2
    for (int i3 = 0; i3 < 2; ++i3) {
      const __m512i lo = _mm512_unpacklo_epi16(halves[i3][0], halves[i3][1]);  // i1 i0 p1 p0, i2 = 0
      const __m512i hi = _mm512_unpackhi_epi16(halves[i3][0], halves[i3][1]);  // i2 = 1
      const __m512i u = transpose_bits(_mm512_unpacklo_epi32(lo, hi)), v = transpose_bits(_mm512_unpackhi_epi32(lo, hi));
      out[4 * i3] = field<4, 4>(u), out[4 * i3 + 2] = _mm512_and_si512(u, _mm512_set1_epi8(15));
      out[4 * i3 + 1] = field<4, 4>(v), out[4 * i3 + 3] = _mm512_and_si512(v, _mm512_set1_epi8(15));
    }
  } else {
    __m512i bytes[4][2], words[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512i a = line(lines[2 * j]), b = line(lines[2 * j + 1]);
      bytes[j][0] = _mm512_unpacklo_epi8(a, b), bytes[j][1] = _mm512_unpackhi_epi8(a, b);
    }
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j)
#pragma GCC unroll 2
      for (int i3 = 0; i3 < 2; ++i3) {
        words[j][2 * i3] = _mm512_unpacklo_epi16(bytes[2 * j][i3], bytes[2 * j + 1][i3]);
        words[j][2 * i3 + 1] = _mm512_unpackhi_epi16(bytes[2 * j][i3], bytes[2 * j + 1][i3]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = transpose_bits(_mm512_unpacklo_epi32(words[0][i], words[1][i]));
      out[2 * i + 1] = transpose_bits(_mm512_unpackhi_epi32(words[0][i], words[1][i]));
    }
  }
}

ANYBIT_INLINE Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
ANYBIT_INLINE void store_codes(std::uint8_t* p, Codes c) { _mm512_storeu_si512(p, c); }

template <size_t Q>
ANYBIT_INLINE Codes spread(Codes kept, Codes mask, int z) {
  const __m512i places = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPlaces)));
  constexpr int first = Q % 2 * 0x02020202;  // of each row's four bytes in a lane of four rows
  const __m512i from = _mm512_set4_epi32(first + 0x0C0C0C0C, first + 0x08080808, first + 0x04040404, first);
  const __m512i place = _mm512_permutexvar_epi32(_mm512_srli_epi32(mask, 4 * Q), places);
  const __m512i codes = _mm512_shuffle_epi8(kept, _mm512_or_si512(place, from));
  return _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(z)));
}

ANYBIT_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
template <size_t P>
ANYBIT_INLINE void dot(Ints& sum, Codes codes, const std::int8_t* x) {
  int quad;
  std::memcpy(&quad, x, 4);
  sum = _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(quad));
}
ANYBIT_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

ANYBIT_INLINE Reals to_reals(Ints a) { return _mm512_cvtepi32_ps(a); }
ANYBIT_INLINE Ints to_ints(Reals a) { return _mm512_cvttps_epi32(a); }
ANYBIT_INLINE Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
ANYBIT_INLINE Ints subtract(Ints c, Ints a, std::int32_t b) {
  return _mm512_sub_epi32(c, _mm512_mullo_epi32(a, _mm512_set1_epi32(b)));
}
ANYBIT_INLINE Reals splat(float a) { return _mm512_set1_ps(a); }
ANYBIT_INLINE Reals load_reals(const float* p) { return _mm512_loadu_ps(p); }
ANYBIT_INLINE Reals load_halves(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ANYBIT_INLINE __m128i sixteen_bytes(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
ANYBIT_INLINE __m128i sixteen_nibbles(const std::uint8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_and_si128(_mm_unpacklo_epi64(b, _mm_srli_epi16(b, 4)), _mm_set1_epi8(15));
}
ANYBIT_INLINE Reals load_bytes(const std::uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_bytes(p))); }
ANYBIT_INLINE Reals load_nibbles(const std::uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_nibbles(p))); }
ANYBIT_INLINE Reals mul(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
// c - a * b, one rounding: a factor out of memory costs nothing here, negated beforehand it would take three instructions.
ANYBIT_INLINE Reals subtract(Reals c, Reals a, Reals b) { return _mm512_fnmadd_ps(a, b, c); }
ANYBIT_INLINE void store(std::int32_t* y, Ints a, size_t lanes) {
  _mm512_mask_storeu_epi32(y, static_cast<__mmask16>((1u << lanes) - 1), a);
}

}  // namespace anybit::ANYBIT_TARGET
