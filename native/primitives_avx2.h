// AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

namespace anybit::ANYBIT_TARGET {

constexpr size_t kCodes = 32;
constexpr size_t kLanes = 8;
using Words = __m256i;
using Floats = __m256;

ANYBIT_INLINE void expand(const std::uint8_t* bits, std::uint8_t* codes, unsigned weight) {
  int word;
  std::memcpy(&word, bits, 4);
  // Each byte lane receives the plane byte that holds its bit, then tests that bit.
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i pick = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201u));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), spread);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, pick), pick);
  auto* out = reinterpret_cast<__m256i*>(codes);
  const __m256i add = _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(weight)));
  _mm256_storeu_si256(out, _mm256_or_si256(_mm256_loadu_si256(out), add));
}

ANYBIT_INLINE void collapse(const std::uint8_t* codes, unsigned weight, std::uint8_t* bits) {
  const __m256i w = _mm256_set1_epi8(static_cast<char>(weight));
  const __m256i c = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const int word = _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_and_si256(c, w), w));
  std::memcpy(bits, &word, 4);
}

ANYBIT_INLINE __m256i strides(size_t s) {
  return _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(static_cast<int>(s)));
}
ANYBIT_INLINE Words load_words(const std::uint8_t* p, size_t s) {
  return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), strides(s), 1);
}
ANYBIT_INLINE Floats load_strided(const float* p, size_t s) { return _mm256_i32gather_ps(p, strides(s), 4); }

// Eight entries fit a register: look up in both halves, choose by bit 3, which the blend reads from the sign position.
ANYBIT_INLINE Floats lookup(const float* table, Words w) {
  const Floats low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), w);
  const Floats high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), w);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(w, 28)));
}
ANYBIT_INLINE Words shift4(Words w) { return _mm256_srli_epi32(w, 4); }
ANYBIT_INLINE Floats broadcast(float v) { return _mm256_set1_ps(v); }
ANYBIT_INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
ANYBIT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

ANYBIT_INLINE void store(float* y, Floats v, size_t n) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  _mm256_maskstore_ps(y, mask, v);
}

ANYBIT_INLINE float half(std::uint16_t h) { return _cvtsh_ss(h); }
ANYBIT_INLINE void halves(const std::uint16_t* h, float* f, size_t n) {
  size_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(f + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
  for (; i < n; ++i) f[i] = half(h[i]);
}

}  // namespace anybit::ANYBIT_TARGET
