// Bit-plane weights times int8 activations. Lanes are rows: four columns of 16 rows are one register of codes, four activations
// are broadcast to all of them, and one multiply-add instruction adds 64 products to 16 exact sums without a shuffle.
//
//   few tokens    codes are expanded out of the planes in registers and used for 1, 2 or 4 tokens at once
//   more tokens   a strip of 16 rows is expanded once into the cache and multiplied by all tokens (tiles where there is AMX)
//
// The float epilogue, in this order for every path, so that all give the same bits: per group, left to right,
//   total = fma(scale * x_scale, fma(-x_sum, zero, float(sum)), total).
//
// The inner difference is exact: taken in integers where a group is so long that float would round it.
#include "cpu.h"

#include <vector>

#include "primitives.h"
#if defined(ANYBIT_TARGET_avx512) || defined(ANYBIT_TARGET_amx)
#include "vector_avx512.h"
#elif defined(ANYBIT_TARGET_avx2)
#include "vector_avx2.h"
#else
#include "vector_scalar.h"
#endif
#include "sources.h"

namespace anybit::ANYBIT_TARGET {
namespace {

#if defined(ANYBIT_TARGET_scalar)
constexpr size_t kDirectTokens = 0;  // strips alone: a fifth of the code, 5 to 13 % slower for 1 to 4 tokens
#else
constexpr size_t kDirectTokens = 8;  // up to here expanding again for every four tokens costs less than a strip
#endif
constexpr size_t kTokenChunk = 256;  // tokens whose activations stay in the second-level cache under a passing strip

// Scale and zero of 16 rows in one group.
struct Grid {
  Reals scale, zero;
  ANYBIT_INLINE Grid(Reals s, Reals z) : scale(s), zero(z) {}
  ANYBIT_INLINE Grid(const TiledWeight& w, size_t block, size_t g) : Grid(w, block * w.groups + g) {}
  ANYBIT_INLINE Grid(const TiledWeight& w, size_t at) {
    scale = mul(load_halves(w.scale + at * TiledWeight::kRows), splat(w.scale_mul));
    zero = splat(w.zero_add);
    if (!w.zero) return;
    const std::uint8_t* zeros = w.zero + at * w.zero_bytes;
    zero = fma(w.zero_bytes == 8 ? load_nibbles(zeros) : load_bytes(zeros), splat(w.zero_mul), zero);
  }
  ANYBIT_INLINE Reals add_to(Reals total, Ints sum, float x_scale, float x_sum) const {
    return fma(mul(scale, splat(x_scale)), subtract(to_reals(sum), zero, splat(x_sum)), total);
  }
  // The same where `whole_zeros` of the weight.
  ANYBIT_INLINE Reals add_whole(Reals total, Ints sum, float x_scale, float x_sum) const {
    return fma(mul(scale, splat(x_scale)), to_reals(subtract(sum, to_ints(zero), static_cast<std::int32_t>(x_sum))), total);
  }
};

// What every way of multiplying does with the sums of a group: T tokens from `token` x one row block.
template <size_t T, size_t kSums>
ANYBIT_INLINE void finish_group(Ints (&sum)[T][kSums], Reals (&total)[T], const TiledWeight& w, const Activations& x,
                                const Output& out, size_t block, size_t token, size_t g) {
  if constexpr (kSums == 2)
    for (size_t t = 0; t < T; ++t) sum[t][0] = add(sum[t][0], sum[t][1]);
  if (out.sums) {
    const size_t first = block * TiledWeight::kRows, lanes = least(TiledWeight::kRows, w.rows - first);
    for (size_t t = 0; t < T; ++t) store(out.sums + ((token + t) * w.groups + g) * w.rows + first, sum[t][0], lanes);
    return;
  }
  const Grid grid(w, block, g);
  const bool whole = w.whole_zeros();
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) {
    const size_t at = (token + t) * x.groups + g;
    total[t] = whole ? grid.add_whole(total[t], sum[t][0], x.scale[at], x.sums[at])
                     : grid.add_to(total[t], sum[t][0], x.scale[at], x.sums[at]);
  }
}

template <size_t T>
ANYBIT_INLINE void finish_rows(const Reals (&total)[T], const TiledWeight& w, const Output& out, size_t block, size_t token) {
  const size_t first = block * TiledWeight::kRows, lanes = least(TiledWeight::kRows, w.rows - first);
  if (out.y)
    for (size_t t = 0; t < T; ++t) store(out.y + (token + t) * out.y_stride + first, total[t], lanes);
}

template <size_t T, size_t kSums>
ANYBIT_INLINE void clear(Ints (&sum)[T][kSums]) {
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t)
    for (size_t i = 0; i < kSums; ++i) sum[t][i] = zero_ints();
}

// 16 rows for T tokens from `token`. Two sums a token while there are few, to hide the latency of the multiply-add.
template <size_t T, class Source>
ANYBIT_INLINE void multiply(const Source& source, const TiledWeight& w, const Activations& x, const Output& out, size_t block,
                            size_t token) {
  constexpr size_t kSums = T < 4 ? 2 : 1;
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  const std::int8_t* xs = x.codes + token * x.stride;
  Reals total[T];
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) total[t] = splat(0.0f);
  for (size_t g = 0, chunk = 0; g < w.groups; ++g) {
    Ints sum[T][kSums];
    clear(sum);
    for (const size_t end = least(chunk + per_group, chunks); chunk < end; ++chunk) {
      Codes codes[kQuads];
      source.load(chunk, codes);
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q)
#pragma GCC unroll 8
        for (size_t t = 0; t < T; ++t)
          dot<Source::kLines>(sum[t][q % kSums], codes[q], xs + t * x.stride + chunk * TiledWeight::kColumns + 4 * q);
    }
    if constexpr (Source::kStreams) {
      const size_t at = block * w.groups + g;
      __builtin_prefetch(reinterpret_cast<const std::uint8_t*>(w.scale + at * TiledWeight::kRows) + kScaleAhead);
      if (w.zero) __builtin_prefetch(w.zero + at * w.zero_bytes + kZeroAhead);
    }
    finish_group(sum, total, w, x, out, block, token, g);
  }
  finish_rows(total, w, out, block, token);
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
#include "grains.h"
namespace anybit::ANYBIT_TARGET {
namespace {

// 32 rows for T tokens out of two strips: each activation fetched serves two multiply-adds, so that loads do not hold them up.
template <size_t T, size_t L>
ANYBIT_INLINE void multiply_pair(const std::uint8_t* strip, size_t apart, const TiledWeight& w, const Activations& x,
                                 const Output& out, size_t block, size_t token) {
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  const std::int8_t* xs = x.codes + token * x.stride;
  Reals low[T], high[T];
#pragma GCC unroll 8
  for (size_t t = 0; t < T; ++t) low[t] = high[t] = splat(0.0f);
  for (size_t g = 0, chunk = 0; g < w.groups; ++g) {
    Ints sum[T][1], other[T][1];
    clear(sum), clear(other);
    for (const size_t end = least(chunk + per_group, chunks); chunk < end; ++chunk)
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q) {
        const std::uint8_t* at = strip + (chunk * kQuads + q) * 64;
        const Codes a = load_codes(at), b = load_codes(at + apart);
#pragma GCC unroll 8
        for (size_t t = 0; t < T; ++t) {
          const std::int8_t* four = xs + t * x.stride + chunk * TiledWeight::kColumns + 4 * q;
          dot<L>(sum[t][0], a, four), dot<L>(other[t][0], b, four);
        }
      }
    finish_group(sum, low, w, x, out, block, token, g);
    finish_group(other, high, w, x, out, block + 1, token, g);
  }
  finish_rows(low, w, out, block, token), finish_rows(high, w, out, block + 1, token);
}

// Tokens [begin, end), as many at once as there are registers for: expanding codes costs as much as three tokens do.
template <class Source>
void multiply_all(const Source& source, const TiledWeight& w, const Activations& x, const Output& out, size_t block, size_t begin,
                  size_t end) {
#if defined(ANYBIT_TARGET_avx512) || defined(ANYBIT_TARGET_amx)
  for (; begin + 8 <= end; begin += 8) multiply<8>(source, w, x, out, block, begin);
  if (begin + 6 <= end) multiply<6>(source, w, x, out, block, begin), begin += 6;
#endif
  for (; begin + 4 <= end; begin += 4) multiply<4>(source, w, x, out, block, begin);
  if (begin + 3 <= end) multiply<3>(source, w, x, out, block, begin), begin += 3;
  if (begin + 2 <= end) multiply<2>(source, w, x, out, block, begin), begin += 2;
  if (begin < end) multiply<1>(source, w, x, out, block, begin);
}

ANYBIT_INLINE size_t strip_bytes(const TiledWeight& w) { return (w.chunks() + 1) / 2 * 1024; }

// `bytes` of a vector that only grows, on a cache line.
ANYBIT_INLINE std::uint8_t* aligned(std::vector<std::uint8_t>& memory, size_t bytes) {
  if (memory.size() < bytes + 64) memory.resize(bytes + 64);
  return memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
}

#if defined(ANYBIT_TARGET_amx)
}  // namespace
}  // namespace anybit::ANYBIT_TARGET
#include "tiles_amx.h"
#include "tiles_few_amx.h"
namespace anybit::ANYBIT_TARGET {
namespace {
#else
ANYBIT_INLINE size_t multiply_tiles(ExpandStrip, const TiledWeight&, const Activations&, const Output&, size_t, size_t, size_t begin,
                                    size_t, std::vector<std::uint8_t>&) {
  return begin;
}
template <class Source>
ANYBIT_INLINE bool multiply_few(const TiledWeight&, const Activations&, const Output&, size_t, size_t) {
  return false;
}
#endif

// Row blocks [first, last) for more tokens than are worth expanding again for: by strips, two blocks at a time where there are
// registers for it.
template <size_t L>
void multiply_strips(ExpandStrip expand, const TiledWeight& stored, const Activations& whole, const Output& out, size_t first,
                     size_t last, size_t begin, size_t end, std::vector<std::uint8_t>& memory) {
  constexpr size_t kTokens = 6;
  const RowView view(stored, whole, begin, end);
  const TiledWeight& w = view.w;
  const Activations& x = view.x;
  const size_t bytes = strip_bytes(w);
  std::uint8_t* strip = aligned(memory, 2 * bytes);
  for (size_t block = first, count; block < last; block += count) {
    count = kPairs && block + 2 <= last ? 2 : 1;
    for (size_t i = 0; i < count; ++i) {
      expand(stored, block + i, strip + i * bytes);
      if (stored.grain) expand_grains(stored, block + i, kByteZero, strip + i * bytes);
    }
    size_t token = begin;
    if (count == 2)
      for (; token + kTokens <= end; token += kTokens) multiply_pair<kTokens, L>(strip, bytes, w, x, out, block, token);
    for (size_t i = 0; i < count; ++i) multiply_all(FromStrip<L>{strip + i * bytes}, w, x, out, block + i, token, end);
  }
}

// The same for few tokens: straight from the planes.
template <class Source>
void multiply_directly(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last, size_t begin,
                       size_t end) {
  for (size_t block = first; block < last; ++block) {
    const Source source(w, block);
    if constexpr (!Source::kSparse) {
      if (w.grain) {
        multiply_all_grains(source, w, x, out, block, begin, end);
        continue;
      }
    }
    if constexpr (kDirectTokens > 0) multiply_all(source, w, x, out, block, begin, end);
  }
}

template <class Source>
void run_source(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last) {
  static thread_local std::vector<std::uint8_t> memory;
  const ExpandStrip expand = expand_strip<Source>;
  if (multiply_few<Source>(w, x, out, first, last)) return;
  for (size_t begin = 0; begin < x.tokens; begin += kTokenChunk) {
    const size_t end = least(begin + kTokenChunk, x.tokens);
    const size_t rest = multiply_tiles(expand, w, x, out, first, last, begin, end, memory);
    const bool strips = end - rest > kDirectTokens;
    if (strips && !w.grain) multiply_strips<Source::kLines>(expand, w, x, out, first, last, rest, end, memory);
    else if (strips && !out.sums) multiply_strips<8>(expand, w, x, out, first, last, rest, end, memory);
    else multiply_directly<Source>(w, x, out, first, last, rest, end);
  }
}

void run_blocks(const TiledWeight& w, const Activations& x, const Output& out, size_t first, size_t last) {
  constexpr decltype(&run_source<FromPlanes<1>>) dense[] = {
      run_source<FromPlanes<1>>, run_source<FromPlanes<2>>, run_source<FromPlanes<3>>, run_source<FromPlanes<4>>,
      run_source<FromPlanes<5>>, run_source<FromPlanes<6>>, run_source<FromPlanes<7>>, run_source<FromPlanes<8>>};
  constexpr decltype(&run_source<FromPairs<2>>) sparse[] = {
      run_source<FromPairs<2>>, run_source<FromPairs<3>>, run_source<FromPairs<4>>, run_source<FromPairs<5>>,
      run_source<FromPairs<6>>, run_source<FromPairs<7>>, run_source<FromPairs<8>>};
  (w.mask ? sparse[w.bits - 2] : dense[w.bits - 1])(w, x, out, first, last);
}

// 32 columns of a row as a word; what lies beyond the last column reads as 0.
ANYBIT_INLINE std::uint32_t row_word(const Planes& p, size_t plane, size_t n, size_t chunk) {
  if (n >= p.rows) return 0;
  const std::uint8_t* from = p.row(plane, n) + chunk * 4;
  const size_t left = p.columns - chunk * 32;
  std::uint32_t word = 0;
  if (left >= 32) {
    std::memcpy(&word, from, 4);
    return word;
  }
  std::memcpy(&word, from, (left + 7) / 8);
  return word & ((1u << left) - 1);
}

// Nibble q of `low` and of `high` side by side in byte q.
ANYBIT_INLINE std::uint64_t join_nibbles(std::uint64_t low, std::uint64_t high) {
  const auto spread = [](std::uint64_t x) {
    x = (x | x << 16) & 0x0000FFFF0000FFFF;
    x = (x | x << 8) & 0x00FF00FF00FF00FF;
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
  };
  return spread(low) | spread(high) << 4;
}

// Byte q of the low half of x in byte 2 q.
ANYBIT_INLINE std::uint64_t spread_bytes(std::uint64_t x) {
  x = (x & 0xFFFF) | (x & 0xFFFF0000) << 16;
  return (x | x << 8) & 0x00FF00FF00FF00FF;
}

// Byte 16 l + 2 q + h of a line: columns 4 q .. 4 q + 3 of row 4 l + 2 h in the low nibble, of the next row in the high one.
void tile_blocks(const Planes& p, std::uint8_t* tiles, size_t first, size_t last) {
  const size_t chunks = (p.columns + 31) / 32, blocks = (p.rows + 15) / 16;
  for (size_t plane = 0; plane < p.bits; ++plane)
    for (size_t block = first; block < last; ++block)
      for (size_t chunk = 0; chunk < chunks; ++chunk) {
        std::uint64_t line[TiledWeight::kBytes / 8];
        for (size_t l = 0; l < 4; ++l) {
          const auto row = [&](size_t i) { return row_word(p, plane, block * 16 + 4 * l + i, chunk); };
          const std::uint64_t even = join_nibbles(row(0), row(1)), odd = join_nibbles(row(2), row(3));
          line[2 * l] = spread_bytes(even & 0xFFFFFFFF) | spread_bytes(odd & 0xFFFFFFFF) << 8;
          line[2 * l + 1] = spread_bytes(even >> 32) | spread_bytes(odd >> 32) << 8;
        }
        std::memcpy(tiles + ((plane * blocks + block) * chunks + chunk) * TiledWeight::kBytes, line, sizeof line);
      }
}

}  // namespace

extern const LinearA8Table linear_w_a8_table = {run_blocks, tile_blocks};

}  // namespace anybit::ANYBIT_TARGET
