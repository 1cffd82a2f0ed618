// AVX-512 F + BW + VL + DQ: plane bytes are mask registers, a 16-entry table is one register.
#pragma once

#include <immintrin.h>

namespace anybit::ANYBIT_TARGET {

constexpr size_t kCodes = 64;
constexpr size_t kLanes = 16;
using Words = __m512i;
using Floats = __m512;

ANYBIT_INLINE void expand(const std::uint8_t* bits, std::uint8_t* codes, unsigned weight) {
  __mmask64 set;
  std::memcpy(&set, bits, 8);
  const __m512i c = _mm512_loadu_si512(codes);
  const __m512i add = _mm512_maskz_set1_epi8(set, static_cast<char>(weight));
  _mm512_storeu_si512(codes, _mm512_or_si512(c, add));
}

ANYBIT_INLINE void collapse(const std::uint8_t* codes, unsigned weight, std::uint8_t* bits) {
  const __m512i w = _mm512_set1_epi8(static_cast<char>(weight));
  const __mmask64 set = _mm512_test_epi8_mask(_mm512_loadu_si512(codes), w);
  std::memcpy(bits, &set, 8);
}

ANYBIT_INLINE __m512i strides(size_t s) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(s)));
}
ANYBIT_INLINE Words load_words(const std::uint8_t* p, size_t s) { return _mm512_i32gather_epi32(strides(s), p, 1); }
ANYBIT_INLINE Floats load_strided(const float* p, size_t s) { return _mm512_i32gather_ps(strides(s), p, 4); }
ANYBIT_INLINE Floats lookup(const float* table, Words w) { return _mm512_permutexvar_ps(w, _mm512_loadu_ps(table)); }
ANYBIT_INLINE Words shift4(Words w) { return _mm512_srli_epi32(w, 4); }
ANYBIT_INLINE Floats broadcast(float v) { return _mm512_set1_ps(v); }
ANYBIT_INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
ANYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

ANYBIT_INLINE void store(float* y, Floats v, size_t n) {
  _mm512_mask_storeu_ps(y, static_cast<__mmask16>((1u << n) - 1), v);
}

ANYBIT_INLINE float half(std::uint16_t h) { return _cvtsh_ss(h); }
ANYBIT_INLINE void halves(const std::uint16_t* h, float* f, size_t n) {
  for (size_t i = 0; i < n; i += 16) {
    const auto mask = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1u << (n - i)) - 1);
    _mm512_mask_storeu_ps(f + i, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, h + i)));
  }
}

}  // namespace anybit::ANYBIT_TARGET
