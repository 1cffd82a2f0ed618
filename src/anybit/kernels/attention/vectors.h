// Float vectors of the attention kernel: compiler vectors, so arithmetic and comparisons are operators; intrinsics only for what
// has none.
#pragma once

#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

#if defined(__AVX512F__)
constexpr size_t kVec = 16, kTileVecs = 4;
#elif defined(__AVX2__)
constexpr size_t kVec = 8, kTileVecs = 2;
#else
constexpr size_t kVec = 4, kTileVecs = 2;
#endif
constexpr size_t kTileRows = 6;  // kTileRows * kTileVecs accumulators fill the registers, and hide the latency of an fma

typedef float Vec __attribute__((vector_size(kVec * 4)));
typedef std::int32_t Ints __attribute__((vector_size(kVec * 4)));

ANYBIT_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ANYBIT_INLINE void save(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
ANYBIT_INLINE Vec all(float x) { return x - Vec{}; }
ANYBIT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

ANYBIT_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;  // without the instruction, fma is a function call
#endif
}

ANYBIT_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float m = v[0];
  for (size_t i = 1; i < kVec; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

ANYBIT_INLINE float total(Vec v) {
  float sum = 0.0f;
  for (size_t i = 0; i < kVec; ++i) sum += v[i];
  return sum;
}

// exp(x) for x <= 88, within 3e-7 of it; 0 below -87 (also for -inf), exactly 1 at 0. x = n ln 2 + r, Taylor to r^6.
ANYBIT_INLINE Vec exponential(Vec x) {
  const Vec clamped = larger(x, all(-87.0f)), magic = all(0x1.8p23f);  // adding it rounds to an integer
  const Vec shifted = fused(clamped, all(1.44269504f), magic), n = shifted - magic;
  const Vec r = fused(n, all(1.42860677e-6f), fused(n, all(-0.693148613f), clamped));
  Vec p = fused(r, all(1.0f / 720), all(1.0f / 120));
  p = fused(p, r, all(1.0f / 24));
  p = fused(p, r, all(1.0f / 6));
  p = fused(p, r, all(0.5f));
  p = fused(p, r, all(1.0f));
  p = fused(p, r, all(1.0f));
  const Vec power = (Vec)((Ints)p + ((Ints)shifted << 23));
  return x < all(-87.0f) ? Vec{} : power;
}

// How one stored row becomes floats: `raw` loads kVec columns, `value(raw, i)` is row k + i * rows / kRows of them, i < kRows.
struct Half {
  using Element = std::uint16_t;
  static constexpr size_t kRows = 1;
#if defined(__AVX2__)
  ANYBIT_INLINE static Vec raw(const Element* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  }
#else
  ANYBIT_INLINE static Vec raw(const Element* p) {
    Vec v;
    for (size_t i = 0; i < kVec; ++i) v[i] = half(p[i]);
    return v;
  }
#endif
  ANYBIT_INLINE static Vec value(Vec v, size_t) { return v; }
};

ANYBIT_INLINE Ints widen(const std::uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return Ints{p[0], p[1], p[2], p[3]};
#endif
}

struct Byte {
  using Element = std::uint8_t;
  static constexpr size_t kRows = 1;
  ANYBIT_INLINE static Ints raw(const Element* p) { return widen(p); }
  ANYBIT_INLINE static Vec value(Ints v, size_t) { return __builtin_convertvector(v, Vec); }
};

struct Nibble {
  using Element = std::uint8_t;
  static constexpr size_t kRows = 2;
  ANYBIT_INLINE static Ints raw(const Element* p) { return widen(p); }
  ANYBIT_INLINE static Vec value(Ints v, size_t i) {
#if defined(__AVX512F__)
    const Vec table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // the lookup sees the low four bits alone
    return _mm512_permutexvar_ps((__m512i)(i ? v >> 4 : v), table);
#else
    return __builtin_convertvector(i ? v >> 4 : v & 15, Vec);
#endif
  }
};

struct Crumb {
  using Element = std::uint8_t;
  static constexpr size_t kRows = 4;
  ANYBIT_INLINE static Ints raw(const Element* p) { return widen(p); }
  ANYBIT_INLINE static Vec value(Ints v, size_t i) { return __builtin_convertvector(v >> static_cast<int>(2 * i) & 3, Vec); }
};

// Rows that are floats already, taken in the order in which `Codes` gives them.
template <class Codes>
struct Converted {
  using Element = float;
  static constexpr size_t kRows = Codes::kRows;
};

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
