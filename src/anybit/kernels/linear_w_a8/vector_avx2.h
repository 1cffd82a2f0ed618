// AVX2: 16 rows are two registers.
#pragma once

#include <immintrin.h>

#include "linear_w_a8/places.h"

namespace anybit::ANYBIT_TARGET {

struct Codes {
  __m256i low, high;
};
struct Ints {
  __m256i low, high;
};
struct Reals {
  __m256 low, high;
};

// One stored byte holds four columns of two rows; a shuffle hands it to its eight output bytes, each of which tests its own bit.
constexpr bool kPairs = false;  // whether registers hold the sums of two row blocks for six tokens

template <size_t P>
ANYBIT_INLINE void expand(const std::uint8_t* const* lines, Codes (&out)[8]) {
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  const __m256i rows = _mm256_set_epi64x(0x0101010101010101, 0, 0x0101010101010101, 0);
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i pick = _mm256_add_epi8(rows, _mm256_set1_epi8(static_cast<char>(2 * q)));
    __m256i low = _mm256_setzero_si256(), high = low;
#pragma GCC unroll 8
    for (size_t p = 0; p < P; ++p) {
      const auto* line = reinterpret_cast<const __m256i*>(lines[p]);
      const __m256i a = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_loadu_si256(line), pick), bit);
      const __m256i b = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_loadu_si256(line + 1), pick), bit);
      low = _mm256_sub_epi8(_mm256_add_epi8(low, low), _mm256_cmpeq_epi8(a, bit));
      high = _mm256_sub_epi8(_mm256_add_epi8(high, high), _mm256_cmpeq_epi8(b, bit));
    }
    out[q] = {low, high};
  }
}

ANYBIT_INLINE Codes load_codes(const std::uint8_t* p) {
  const auto* line = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(line), _mm256_loadu_si256(line + 1)};
}
ANYBIT_INLINE void store_codes(std::uint8_t* p, const Codes& c) {
  auto* line = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(line, c.low), _mm256_storeu_si256(line + 1, c.high);
}

template <size_t Q>
ANYBIT_INLINE __m256i spread_half(__m256i kept, __m256i mask, __m256i zero) {
  const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPlaces));
  constexpr int first = Q % 2 * 0x02020202;  // of each row's four bytes in a lane of four rows
  const __m256i from = _mm256_setr_epi32(first, first + 0x04040404, first + 0x08080808, first + 0x0C0C0C0C,  //
                                         first, first + 0x04040404, first + 0x08080808, first + 0x0C0C0C0C);
  const __m256i place = _mm256_permutevar8x32_epi32(places, _mm256_srli_epi32(mask, 4 * Q));
  return _mm256_xor_si256(_mm256_shuffle_epi8(kept, _mm256_or_si256(place, from)), zero);
}
template <size_t Q>
ANYBIT_INLINE Codes spread(const Codes& kept, const Codes& mask, int z) {
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(z));
  return {spread_half<Q>(kept.low, mask.low, zero), spread_half<Q>(kept.high, mask.high, zero)};
}

ANYBIT_INLINE Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

// The byte multiply-add saturates at 16 bits: two products of a full byte code could pass it, those of a nibble cannot.
template <size_t P>
ANYBIT_INLINE __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
  if constexpr (P < 8)
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), x);
  const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble), x);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
template <size_t P>
ANYBIT_INLINE void dot(Ints& sum, const Codes& codes, const std::int8_t* x) {
  int quad;
  std::memcpy(&quad, x, 4);
  const __m256i four = _mm256_set1_epi32(quad);
  sum = {dot_half<P>(sum.low, codes.low, four), dot_half<P>(sum.high, codes.high, four)};
}
ANYBIT_INLINE Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

ANYBIT_INLINE Reals to_reals(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
ANYBIT_INLINE Ints to_ints(Reals a) { return {_mm256_cvttps_epi32(a.low), _mm256_cvttps_epi32(a.high)}; }
ANYBIT_INLINE Ints mul(Ints a, Ints b) { return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)}; }
ANYBIT_INLINE Ints subtract(Ints c, Ints a, std::int32_t b) {
  const Ints product = mul(a, {_mm256_set1_epi32(b), _mm256_set1_epi32(b)});
  return {_mm256_sub_epi32(c.low, product.low), _mm256_sub_epi32(c.high, product.high)};
}
ANYBIT_INLINE Reals splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
ANYBIT_INLINE Reals load_reals(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ANYBIT_INLINE Reals load_halves(const std::uint16_t* p) {
  const auto* h = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
ANYBIT_INLINE Reals bytes_to_reals(__m128i low, __m128i high) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))};
}
ANYBIT_INLINE Reals load_bytes(const std::uint8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return bytes_to_reals(b, _mm_srli_si128(b, 8));
}
ANYBIT_INLINE Reals load_nibbles(const std::uint8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), nibble = _mm_set1_epi8(15);
  return bytes_to_reals(_mm_and_si128(b, nibble), _mm_and_si128(_mm_srli_epi16(b, 4), nibble));
}
ANYBIT_INLINE Reals mul(Reals a, Reals b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
ANYBIT_INLINE Reals fma(Reals a, Reals b, Reals c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
ANYBIT_INLINE Reals subtract(Reals c, Reals a, Reals b) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
ANYBIT_INLINE void store(float* y, Reals a, size_t lanes) {
  alignas(32) float out[16];
  _mm256_store_ps(out, a.low), _mm256_store_ps(out + 8, a.high);
  std::memcpy(y, out, lanes * sizeof(float));
}
ANYBIT_INLINE void store(std::int32_t* y, Ints a, size_t lanes) {
  alignas(32) std::int32_t out[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(out), a.low), _mm256_store_si256(reinterpret_cast<__m256i*>(out + 8), a.high);
  std::memcpy(y, out, lanes * sizeof(std::int32_t));
}

}  // namespace anybit::ANYBIT_TARGET
