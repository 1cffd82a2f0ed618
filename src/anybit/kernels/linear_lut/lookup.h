// Table look-ups of R row blocks x T tokens over chunks [begin, end), as 16 biased sums each:
//   out[r][t][row] = sum over chunks, planes, cells of c_i (table entry of the cell's four plane bits), modulo 2^32.
#pragma once

#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace anybit::ANYBIT_TARGET {

using Sums = std::uint32_t[LutWeight::kRows];

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

constexpr size_t kBlockTile = 4, kTokenTile = 2;

// A 64-entry byte table holds the cells of four plane bytes. With the four bytes of a row side by side, VPERMB looks all of
// them up and VPDPBUSD adds them to the row's 32-bit sum, times the plane's coefficient: nothing to widen, nothing to flush.
template <size_t R, size_t T>
ANYBIT_INLINE void look_up(const LutWeight& w, size_t block, const LutTables* tables, size_t begin, size_t end,
                           Sums (&out)[R][T]) {
  const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i gather = _mm512_add_epi8(_mm512_mullo_epi32(row, _mm512_set1_epi32(0x01010101)), _mm512_set1_epi32(0x30201000));
  const __m512i nibble = _mm512_set1_epi8(15), cell = _mm512_set1_epi32(0x30201000);
  const size_t chunks = w.chunks(), block_bytes = chunks * w.bits * LutWeight::kBytes;
  __m512i low[R][T], high[R][T];
#pragma GCC unroll 8
  for (size_t i = 0; i < R * T; ++i) low[i / T][i % T] = high[i / T][i % T] = _mm512_setzero_si512();
  for (size_t c = begin; c < end; ++c) {
    __m512i table[T][4];
#pragma GCC unroll 8
    for (size_t i = 0; i < T * 4; ++i) table[i / 4][i % 4] = _mm512_load_si512(tables[i / 4 * chunks + c].bytes[i % 4]);
    const std::uint8_t* line = w.lines + block * block_bytes + c * w.bits * LutWeight::kBytes;
    for (size_t i = 0; i < w.bits; ++i, line += LutWeight::kBytes) {
      const __m512i coefficient = _mm512_set1_epi8(w.coefficients[i]);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r) {
        const __m512i bits = _mm512_permutexvar_epi8(gather, _mm512_loadu_si512(line + r * block_bytes));
        // (bits & nibble) | cell
        const __m512i even = _mm512_ternarylogic_epi32(bits, nibble, cell, 0xEA);
        const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits, 4), nibble, cell, 0xEA);
#pragma GCC unroll 2
        for (size_t t = 0; t < T; ++t) {
          low[r][t] = _mm512_dpbusd_epi32(low[r][t], _mm512_permutexvar_epi8(even, table[t][0]), coefficient);
          high[r][t] = _mm512_dpbusd_epi32(high[r][t], _mm512_permutexvar_epi8(even, table[t][1]), coefficient);
          low[r][t] = _mm512_dpbusd_epi32(low[r][t], _mm512_permutexvar_epi8(odd, table[t][2]), coefficient);
          high[r][t] = _mm512_dpbusd_epi32(high[r][t], _mm512_permutexvar_epi8(odd, table[t][3]), coefficient);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (size_t i = 0; i < R * T; ++i)
    _mm512_storeu_si512(out[i / T][i % T], _mm512_add_epi32(low[i / T][i % T], _mm512_slli_epi32(high[i / T][i % T], 8)));
}

#elif defined(__AVX2__)

constexpr size_t kBlockTile = 1, kTokenTile = 1;
constexpr size_t kRun = 16;  // chunks: 4 entries each of at most 1020 add up to 65280 in a 16-bit lane

// Two 16-bit vectors of one plane: rows 0-7 and rows 8-15, each for two of the four bytes of a line.
struct Halves {
  __m256i first, second;

  // Bytes h = 0, 1 of the entries chosen by nibbles, widened and added.
  ANYBIT_INLINE void take(const std::uint8_t* low, const std::uint8_t* high, __m256i nibbles) {
    const __m256i l = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(low)), nibbles);
    const __m256i h = _mm256_shuffle_epi8(_mm256_load_si256(reinterpret_cast<const __m256i*>(high)), nibbles);
    first = _mm256_add_epi16(first, _mm256_unpacklo_epi8(l, h));
    second = _mm256_add_epi16(second, _mm256_unpackhi_epi8(l, h));
  }
};

ANYBIT_INLINE __m256i widened(__m256i v) {
  const __m256i low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(v));
  return _mm256_add_epi32(low, _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}

template <size_t R, size_t T>
ANYBIT_INLINE void look_up(const LutWeight& w, size_t block, const LutTables* tables, size_t begin, size_t end,
                           Sums (&out)[R][T]) {
  static_assert(R == 1 && T == 1);
  const __m256i nibble = _mm256_set1_epi8(15);
  const size_t chunk_bytes = w.bits * LutWeight::kBytes;
  __m256i first = _mm256_setzero_si256(), second = first;
  for (size_t run = begin; run < end; run += kRun)
    for (size_t i = 0; i < w.bits; ++i) {
      Halves sums{_mm256_setzero_si256(), _mm256_setzero_si256()};
      for (size_t c = run; c < end && c < run + kRun; ++c) {
        const std::uint8_t* line = w.lines + (block * w.chunks() + c) * chunk_bytes + i * LutWeight::kBytes;
#pragma GCC unroll 2
        for (size_t half = 0; half < 2; ++half) {
          const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * half));
          const auto& table = tables[c].bytes;
          sums.take(table[0][2 * half], table[1][2 * half], _mm256_and_si256(bits, nibble));
          sums.take(table[2][2 * half], table[3][2 * half], _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
        }
      }
      const __m256i coefficient = _mm256_set1_epi32(w.coefficients[i]);
      first = _mm256_add_epi32(first, _mm256_mullo_epi32(widened(sums.first), coefficient));
      second = _mm256_add_epi32(second, _mm256_mullo_epi32(widened(sums.second), coefficient));
    }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[0][0]), first);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[0][0] + 8), second);
}

#else

constexpr size_t kBlockTile = 1, kTokenTile = 1;

ANYBIT_INLINE std::uint32_t entry(const LutTables& t, size_t side, size_t j, unsigned e) {
  return t.bytes[2 * side][j][e] + 256u * t.bytes[2 * side + 1][j][e];
}

template <size_t R, size_t T>
ANYBIT_INLINE void look_up(const LutWeight& w, size_t block, const LutTables* tables, size_t begin, size_t end,
                           Sums (&out)[R][T]) {
  static_assert(R == 1 && T == 1);
  Sums total = {};
  for (size_t c = begin; c < end; ++c)
    for (size_t i = 0; i < w.bits; ++i) {
      const std::uint8_t* line = w.lines + ((block * w.chunks() + c) * w.bits + i) * LutWeight::kBytes;
      const auto coefficient = static_cast<std::uint32_t>(w.coefficients[i]);
      for (size_t j = 0; j < 4; ++j)
        for (size_t r = 0; r < LutWeight::kRows; ++r) {
          const unsigned bits = line[16 * j + r];
          total[r] += coefficient * (entry(tables[c], 0, j, bits & 15) + entry(tables[c], 1, j, bits >> 4));
        }
    }
  for (size_t r = 0; r < LutWeight::kRows; ++r) out[0][0][r] = total[r];
}

#endif

}  // namespace anybit::ANYBIT_TARGET
