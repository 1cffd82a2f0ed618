// Float vectors of the target's natural width, in the vector language of gcc and clang: + - * / and comparisons work lane by
// lane, so most kernels need no intrinsics. `m ? a : b` on a comparison chooses by lane.
//
// A product and a sum stay two roundings (-ffp-contract=off), so a kernel that uses only these operators in a fixed order gives
// the same bits on every instruction set; `multiply_add` is one rounding where the target has it and two where it has not.
#pragma once

#include <cstdint>
#include <cstring>

#include "targets.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace anybit::ANYBIT_TARGET {

#if defined(ANYBIT_TARGET_avx512) || defined(ANYBIT_TARGET_amx)
constexpr size_t kWidth = 16;
#elif defined(ANYBIT_TARGET_avx2)
constexpr size_t kWidth = 8;
#else
constexpr size_t kWidth = 4;  // SSE2 and NEON
#endif

template <class T, size_t N>
struct VectorOf {
  typedef T type [[gnu::vector_size(N * sizeof(T))]];
};
using Vec = VectorOf<float, kWidth>::type;
using Ints = VectorOf<std::int32_t, kWidth>::type;

ANYBIT_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ANYBIT_INLINE Vec load_some(const float* p, size_t n) {  // the first n lanes, zeros after them
  Vec v = {};
  std::memcpy(&v, p, n * sizeof *p);
  return v;
}
ANYBIT_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
ANYBIT_INLINE void store_some(float* p, Vec v, size_t n) { std::memcpy(p, &v, n * sizeof *p); }

ANYBIT_INLINE Vec all(float value) { return Vec{} + value; }
ANYBIT_INLINE Ints bits_of(Vec v) { return (Ints)v; }
ANYBIT_INLINE Vec from_bits(Ints v) { return (Vec)v; }

ANYBIT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// combine() over all lanes: halves onto each other, so the order is fixed.
template <class T, size_t N, class Combine>
ANYBIT_INLINE T fold(typename VectorOf<T, N>::type v, Combine combine) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typename VectorOf<T, N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return fold<T, N / 2>(combine(low, high), combine);
  }
}
ANYBIT_INLINE float sum_of(Vec v) {
  return fold<float, kWidth>(v, [](auto a, auto b) { return a + b; });
}
ANYBIT_INLINE std::int32_t sum_of(Ints v) {
  return fold<std::int32_t, kWidth>(v, [](auto a, auto b) { return a + b; });
}
ANYBIT_INLINE std::int32_t largest_of(Ints v) {
  return fold<std::int32_t, kWidth>(v, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace anybit::ANYBIT_TARGET
