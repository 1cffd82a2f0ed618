// y = x W^T for codebooks: codes of kCodes columns of one row are combined from its planes, looked up in the row's own table and
// multiplied with every token at once.
//
// Order of additions is fixed per (t, n): column k goes to lane k % kLanes of accumulator k / kLanes % kParts, left to right, and
// the lanes are added last; so a result depends neither on the number of tokens nor on that of threads.
#include "../planes/expand.h"
#include "cpu.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kParts = kCodes / kLanes;
constexpr size_t kTokens = 4;  // at once: kTokens * kParts accumulators fit the registers of AVX-512

// Lane i = c[i]; a table entry by index, exact for tables of up to 16, 32 and 256 entries.
#if defined(__AVX512F__)
ANYBIT_INLINE Words widen(const std::uint8_t* c) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(c)));
}
ANYBIT_INLINE Floats load(const float* x) { return _mm512_loadu_ps(x); }
ANYBIT_INLINE Floats lookup32(const float* table, Words w) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(table), w, _mm512_loadu_ps(table + 16));
}
ANYBIT_INLINE Floats lookup64(const float* table, Words w) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(w, _mm512_set1_epi32(32)), lookup32(table, w), lookup32(table + 32, w));
}
ANYBIT_INLINE Floats lookup256(const float* table, Words w) { return _mm512_i32gather_ps(w, table, 4); }
#elif defined(__AVX2__)
ANYBIT_INLINE Words widen(const std::uint8_t* c) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(c)));
}
ANYBIT_INLINE Floats load(const float* x) { return _mm256_loadu_ps(x); }
ANYBIT_INLINE Floats lookup256(const float* table, Words w) { return _mm256_i32gather_ps(table, w, 4); }
ANYBIT_INLINE Floats lookup32(const float* table, Words w) { return lookup256(table, w); }
ANYBIT_INLINE Floats lookup64(const float* table, Words w) { return lookup256(table, w); }
#else
ANYBIT_INLINE Words widen(const std::uint8_t* c) { return *c; }
ANYBIT_INLINE Floats load(const float* x) { return *x; }
ANYBIT_INLINE Floats lookup256(const float* table, Words w) { return table[w]; }
ANYBIT_INLINE Floats lookup32(const float* table, Words w) { return table[w]; }
ANYBIT_INLINE Floats lookup64(const float* table, Words w) { return table[w]; }
#endif

template <size_t B>
ANYBIT_INLINE Floats value(const float* table, const std::uint8_t* codes) {
  if constexpr (B <= 4) return lookup(table, widen(codes));
  if constexpr (B == 5) return lookup32(table, widen(codes));
  if constexpr (B == 6) return lookup64(table, widen(codes));
  return lookup256(table, widen(codes));
}

ANYBIT_INLINE float total(const Floats (&sums)[kParts]) {
  alignas(64) float lanes[kParts * kLanes];
  for (size_t i = 0; i < kParts; ++i) store(lanes + i * kLanes, sums[i], kLanes);
  for (size_t count = kParts * kLanes / 2; count; count /= 2)
    for (size_t i = 0; i < count; ++i) lanes[i] += lanes[i + count];
  return lanes[0];
}

// A row's table as float.
ANYBIT_INLINE void load_table(const Planes& p, const Codebook& codebook, size_t n, float* table) {
  halves(codebook.table + (n << p.bits), table, size_t{1} << p.bits);
}

// Row n times T tokens.
template <size_t B, size_t T>
ANYBIT_INLINE void dot(const Planes& p, size_t n, const float* table, const float* x, float* y) {
  const size_t stride = codebook_stride(p.columns);
  alignas(64) std::uint8_t codes[kCodes] = {};
  Floats sums[T][kParts];
#pragma GCC unroll 8
  for (auto& token : sums)
#pragma GCC unroll 8
    for (auto& part : token) part = broadcast(0.0f);
  for (size_t k = 0; k < p.columns; k += kCodes) {
    expand_columns({p.data, B, p.rows, p.columns}, n, k, p.columns - k < kCodes ? p.columns - k : kCodes, codes);
#pragma GCC unroll 8
    for (size_t i = 0; i < kParts; ++i) {
      const Floats w = value<B>(table, codes + i * kLanes);
#pragma GCC unroll 4
      for (size_t t = 0; t < T; ++t) sums[t][i] = fma(w, load(x + t * stride + k + i * kLanes), sums[t][i]);
    }
  }
  for (size_t t = 0; t < T; ++t) y[t * p.rows + n] = total(sums[t]);
}

template <size_t B>
void rows_of_width(const Planes& p, const Codebook& codebook, const float* x, size_t tokens, float* y, size_t begin, size_t end) {
  constexpr decltype(&dot<B, 1>) by_tokens[] = {dot<B, 1>, dot<B, 2>, dot<B, 3>, dot<B, 4>};
  alignas(64) float table[B < 4 ? 16 : 1 << B] = {};  // at least what `lookup` reads
  for (size_t n = begin; n < end; ++n) {
    load_table(p, codebook, n, table);
    for (size_t t = 0; t < tokens; t += kTokens) {
      const size_t count = tokens - t < kTokens ? tokens - t : kTokens;
      by_tokens[count - 1](p, n, table, x + t * codebook_stride(p.columns), y + t * p.rows);
    }
  }
}

template <size_t B>
void decode_of_width(const Planes& p, const Codebook& codebook, float* values, size_t begin, size_t end) {
  alignas(64) float table[B < 4 ? 16 : 1 << B] = {};
  alignas(64) std::uint8_t codes[kCodes] = {};
  for (size_t n = begin; n < end; ++n, values += p.columns) {
    load_table(p, codebook, n, table);
    for (size_t k = 0; k < p.columns; k += kCodes) {
      const size_t count = p.columns - k < kCodes ? p.columns - k : kCodes;
      expand_columns({p.data, B, p.rows, p.columns}, n, k, count, codes);
      for (size_t i = 0; i < count; i += kLanes)
        store(values + k + i, value<B>(table, codes + i), count - i < kLanes ? count - i : kLanes);
    }
  }
}

void linear_rows(const Planes& planes, const Codebook& codebook, const float* x, size_t tokens, float* y, size_t begin,
                 size_t end) {
  constexpr decltype(&rows_of_width<1>) by_width[] = {rows_of_width<1>, rows_of_width<2>, rows_of_width<3>, rows_of_width<4>,
                                                      rows_of_width<5>, rows_of_width<6>, rows_of_width<7>, rows_of_width<8>};
  by_width[planes.bits - 1](planes, codebook, x, tokens, y, begin, end);
}

void decode_rows(const Planes& planes, const Codebook& codebook, float* values, size_t begin, size_t end) {
  constexpr decltype(&decode_of_width<1>) by_width[] = {
      decode_of_width<1>, decode_of_width<2>, decode_of_width<3>, decode_of_width<4>,
      decode_of_width<5>, decode_of_width<6>, decode_of_width<7>, decode_of_width<8>};
  by_width[planes.bits - 1](planes, codebook, values, begin, end);
}

}  // namespace

extern const CodebookTable codebook_table = {decode_rows, linear_rows};

}  // namespace anybit::ANYBIT_TARGET
