// How many bits two rows of words have in common, per 64-bit lane.
//
//   kVector             words of one vector
//   kRun                steps that a Partial can take before it must be drained; 0: any number
//   step(p, a, b)       p += popcount(a & b)
//   drain(p)            counts per 64-bit lane
//   add_scaled(t, c, s) t + c * s per lane; c, s below 2^31
//   lane_sum(v)         sum of the lanes
#pragma once

#include <bit>

#include "targets.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace anybit::ANYBIT_TARGET {

#if defined(__AVX512VPOPCNTDQ__)

constexpr size_t kVector = 8, kRun = 0;
constexpr size_t kRowTile = 4, kTokenTile = 2;
using Lanes = __m512i;
using Partial = __m512i;

ANYBIT_INLINE Lanes zero() { return _mm512_setzero_si512(); }
ANYBIT_INLINE Lanes load(const std::uint64_t* p) { return _mm512_loadu_si512(p); }
ANYBIT_INLINE Partial step(Partial p, Lanes a, Lanes b) {
  return _mm512_add_epi64(p, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
}
ANYBIT_INLINE Lanes drain(Partial p) { return p; }
ANYBIT_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
ANYBIT_INLINE Lanes add_scaled(Lanes t, Lanes c, std::int32_t s) {
  return _mm512_add_epi64(t, _mm512_mul_epi32(c, _mm512_set1_epi64(s)));
}
ANYBIT_INLINE std::int64_t lane_sum(Lanes v) { return _mm512_reduce_add_epi64(v); }
ANYBIT_INLINE void store(std::int64_t* p, Lanes v) { _mm512_storeu_si512(p, v); }

#elif defined(__AVX2__)

// Byte counters by nibble look-up: a step adds at most 8, so 31 of them fit a byte.
constexpr size_t kVector = 4, kRun = 31;
constexpr size_t kRowTile = 4, kTokenTile = 1;
using Lanes = __m256i;
using Partial = __m256i;

ANYBIT_INLINE Lanes zero() { return _mm256_setzero_si256(); }
ANYBIT_INLINE Lanes load(const std::uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ANYBIT_INLINE Partial step(Partial p, Lanes a, Lanes b) {
  const __m256i ones = _mm256_setr_epi64x(0x0302020102010100, 0x0403030203020201, 0x0302020102010100, 0x0403030203020201);
  const __m256i nibble = _mm256_set1_epi8(15), common = _mm256_and_si256(a, b);
  const __m256i low = _mm256_shuffle_epi8(ones, _mm256_and_si256(common, nibble));
  const __m256i high = _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(common, 4), nibble));
  return _mm256_add_epi8(p, _mm256_add_epi8(low, high));
}
ANYBIT_INLINE Lanes drain(Partial p) { return _mm256_sad_epu8(p, _mm256_setzero_si256()); }
ANYBIT_INLINE Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
ANYBIT_INLINE Lanes add_scaled(Lanes t, Lanes c, std::int32_t s) {
  return _mm256_add_epi64(t, _mm256_mul_epi32(c, _mm256_set1_epi64x(s)));
}
ANYBIT_INLINE void store(std::int64_t* p, Lanes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
ANYBIT_INLINE std::int64_t lane_sum(Lanes v) {
  alignas(32) std::int64_t lanes[4];
  store(lanes, v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#else

constexpr size_t kVector = 1, kRun = 0;
constexpr size_t kRowTile = 2, kTokenTile = 1;
using Lanes = std::int64_t;
using Partial = std::int64_t;

ANYBIT_INLINE Lanes zero() { return 0; }
ANYBIT_INLINE Lanes load(const std::uint64_t* p) { return static_cast<Lanes>(*p); }
ANYBIT_INLINE Partial step(Partial p, Lanes a, Lanes b) { return p + std::popcount(static_cast<std::uint64_t>(a & b)); }
ANYBIT_INLINE Lanes drain(Partial p) { return p; }
ANYBIT_INLINE Lanes add(Lanes a, Lanes b) { return a + b; }
ANYBIT_INLINE Lanes add_scaled(Lanes t, Lanes c, std::int32_t s) { return t + c * s; }
ANYBIT_INLINE std::int64_t lane_sum(Lanes v) { return v; }
ANYBIT_INLINE void store(std::int64_t* p, Lanes v) { *p = v; }

#endif

}  // namespace anybit::ANYBIT_TARGET
