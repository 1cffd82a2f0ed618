// The loops that measure a machine: nothing but loads, or nothing but multiply-adds whose results wait for no other.
#include "cpu.h"

#include <cstring>
#include <initializer_list>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace anybit::ANYBIT_TARGET {
namespace {

#if defined(ANYBIT_TARGET_scalar)

// Portable: four running sums of words, which any compiler turns into whatever vectors it may use.
std::uint64_t read(const std::uint8_t* data, size_t bytes) {
  std::uint64_t sums[4] = {};
  for (size_t i = 0; i < bytes; i += 32) {
    std::uint64_t words[4];
    std::memcpy(words, data + i, 32);
    for (size_t j = 0; j < 4; ++j) sums[j] += words[j];
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

extern const MachineTable table = {read, nullptr, nullptr, nullptr};

#else

#if defined(ANYBIT_TARGET_avx2)
using Register = __m256i;
ANYBIT_INLINE Register load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ANYBIT_INLINE Register add(Register a, Register b) { return _mm256_xor_si256(a, b); }
// u8 x s8 to int32 takes three instructions before VNNI: pairs to int16, pairs to int32, add.
ANYBIT_INLINE Register dot(Register sum, Register a, Register b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
#else
using Register = __m512i;
ANYBIT_INLINE Register load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
ANYBIT_INLINE Register add(Register a, Register b) { return _mm512_xor_si512(a, b); }
ANYBIT_INLINE Register dot(Register sum, Register a, Register b) { return _mm512_dpbusd_epi32(sum, a, b); }
#endif

constexpr size_t kWidth = sizeof(Register);

// The compiler must believe that a value changes here: otherwise it would compute the loop instead of running it.
ANYBIT_INLINE void keep(Register& value) { __asm__ volatile("" : "+x"(value)); }

ANYBIT_INLINE std::uint64_t low_word(Register value) {
  std::uint64_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

// Four streams, one per quarter, fetched 2 KiB ahead: one stream alone stalls at every page (NOTES.md).
std::uint64_t read(const std::uint8_t* data, size_t bytes) {
  constexpr size_t kStreams = 4, kAhead = 2048, kLine = 64;
  Register sums[kStreams] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i < part; i += kLine)
#pragma GCC unroll 4
    for (size_t s = 0; s < kStreams; ++s) {
      const std::uint8_t* line = data + s * part + i;
      _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
#pragma GCC unroll 2
      for (size_t j = 0; j < kLine; j += kWidth) sums[s] = add(sums[s], load(line + j));
    }
  return low_word(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// Ten sums in flight: more than latency (5) x ports (2) of any processor so far asks for. Separate variables: gcc keeps an array
// of them in memory here, which is three times slower, and equal ones it would add up once.
double dot_int8(size_t steps, std::int32_t* sink) {
  Register a = {}, b = {}, s0 = {}, s1 = {}, s2 = {}, s3 = {}, s4 = {}, s5 = {}, s6 = {}, s7 = {}, s8 = {}, s9 = {};
  for (Register* sum : {&s0, &s1, &s2, &s3, &s4, &s5, &s6, &s7, &s8, &s9}) keep(*sum);
  for (size_t step = 0; step < steps; ++step) {
    keep(a), keep(b);
    s0 = dot(s0, a, b), s1 = dot(s1, a, b), s2 = dot(s2, a, b), s3 = dot(s3, a, b), s4 = dot(s4, a, b);
    s5 = dot(s5, a, b), s6 = dot(s6, a, b), s7 = dot(s7, a, b), s8 = dot(s8, a, b), s9 = dot(s9, a, b);
  }
  const Register low = add(add(add(s0, s1), add(s2, s3)), s4), high = add(add(add(s5, s6), add(s7, s8)), s9);
  *sink = static_cast<std::int32_t>(low_word(add(low, high)));
  return static_cast<double>(steps) * 10 * kWidth;
}

#if defined(ANYBIT_TARGET_amx)

struct alignas(64) TileShapes {
  std::uint8_t palette = 1, start = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Not _tile_loadconfig: gcc's says that it reads 8 bytes, and then the stores to the other 56 are deleted.
ANYBIT_INLINE void configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }

// Six tiles of sums (of the eight there are) against one pair: 16 x 16 sums of 64 (int8) or 32 (bf16) products each.
template <bool kBf16>
double tiles(size_t steps, std::int32_t* sink) {
  const TileShapes shapes;
  configure(shapes);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
  for (size_t step = 0; step < steps; ++step) {
    if constexpr (kBf16) {
      _tile_dpbf16ps(0, 6, 7); _tile_dpbf16ps(1, 6, 7); _tile_dpbf16ps(2, 6, 7);
      _tile_dpbf16ps(3, 6, 7); _tile_dpbf16ps(4, 6, 7); _tile_dpbf16ps(5, 6, 7);
    } else {
      _tile_dpbusd(0, 6, 7); _tile_dpbusd(1, 6, 7); _tile_dpbusd(2, 6, 7);
      _tile_dpbusd(3, 6, 7); _tile_dpbusd(4, 6, 7); _tile_dpbusd(5, 6, 7);
    }
  }
  std::int32_t out[256];
  _tile_stored(0, out, 64);
  __asm__ volatile("" : : "m"(out));
  _tile_release();
  *sink = 0;
  return static_cast<double>(steps) * 6 * 16 * 16 * (kBf16 ? 32 : 64);
}

extern const MachineTable table = {read, dot_int8, tiles<false>, tiles<true>};
#else
extern const MachineTable table = {read, dot_int8, nullptr, nullptr};
#endif
#endif

}  // namespace

extern const MachineTable machine_table = table;

}  // namespace anybit::ANYBIT_TARGET
