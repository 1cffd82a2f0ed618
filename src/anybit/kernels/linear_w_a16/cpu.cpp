// y = x W^T for affine and binary-coded planes and float32 activations, few tokens at a time; reference.py says what it equals.
//
// With s = 2 bit - 1 (+1 or -1), code = (2^b - 1)/2 + sum_p 2^p s_p / 2, so per group
//   sum_k x_k (code_k - zero) = H / 2 + X ((2^b - 1)/2 - zero),   H = sum_p 2^p sum_k s_pk x_k,   X = sum_k x_k.
// Binary-coded weights have a factor alpha_p of their own in place of 2^p, and a given offset.
// The inner sum of four columns has only 16 values: they are tabulated once per token, and four plane bits of kLanes rows
// become kLanes results by one register lookup. Cost per weight is proportional to its bits; nothing is dequantized.
// Order of additions is fixed per (t, n): cells of a group left to right, planes by Horner, groups left to right; so a result
// depends neither on the number of tokens nor on that of threads.
#include "cpu.h"

#include "../planes/expand.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kCellsPerWord = 8;

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Four plane bytes of `lanes` rows, where the block or the word may be cut short: assembled from the bytes that exist.
[[gnu::noinline]] Words edge_words(const std::uint8_t* row, size_t row_bytes, size_t word, size_t lanes) {
  alignas(64) std::uint8_t bytes[kLanes * 4] = {};
  const size_t count = least(4, row_bytes - word * 4);
  for (size_t lane = 0; lane < lanes; ++lane) std::memcpy(bytes + lane * 4, row + lane * row_bytes + word * 4, count);
  return load_words(bytes, 4);
}

// Adds `count` cells to every plane's sum; the cells of one word, the planes interleaved to hide the latency of add.
template <size_t B>
ANYBIT_INLINE void add_cells(Words (&bits)[B], Floats (&sums)[B], const float* tables, size_t count) {
#pragma GCC unroll 8
  for (size_t cell = 0; cell < count; ++cell)
#pragma GCC unroll 8
    for (size_t i = 0; i < B; ++i) {
      sums[i] = add(sums[i], lookup(tables + cell * 16, bits[i]));
      bits[i] = shift4(bits[i]);
    }
}

// The signed sums of every plane over one group, cells [first, last). Whole words are the hot path. Gathers defeat the hardware's prefetch, so each word also
// fetches its share of the same plane's next row block (the blocks are contiguous): +30 to +60 % measured.
template <size_t B>
ANYBIT_INLINE void group_sums(const Planes& p, size_t n, size_t lanes, const float* tables, size_t first, size_t last,
                              Floats (&sums)[B]) {
  Words bits[B];
#pragma GCC unroll 8
  for (size_t i = 0; i < B; ++i) sums[i] = broadcast(0.0f);
  for (size_t cell = first; cell < last;) {
    const size_t word = cell / kCellsPerWord, skip = cell % kCellsPerWord;
    const size_t count = least(last - cell, kCellsPerWord - skip);
    if (lanes == kLanes && count == kCellsPerWord && word * 4 + 4 <= p.row_bytes()) {
#pragma GCC unroll 8
      for (size_t i = 0; i < B; ++i) {
        bits[i] = load_words(p.row(i, n) + word * 4, p.row_bytes());
        __builtin_prefetch(p.row(i, n + kLanes) + word * 4 * kLanes);
      }
      add_cells(bits, sums, tables, kCellsPerWord);
    } else {
#pragma GCC unroll 8
      for (size_t i = 0; i < B; ++i) {
        bits[i] = edge_words(p.row(i, n), p.row_bytes(), word, lanes);
        for (size_t s = 0; s < skip; ++s) bits[i] = shift4(bits[i]);
      }
      add_cells(bits, sums, tables, count);
    }
    tables += count * 16;
    cell += count;
  }
}

// Affine: y += gain H. Factors of `lanes` rows from `n`: gain = scale / 2, offset = scale ((2^b - 1)/2 - zero), [kLanes][groups].
template <size_t B>
ANYBIT_INLINE Floats add_planes(const Affine& a, const float* gain, size_t g, const Floats (&sums)[B], Floats y) {
  Floats h = sums[0];
#pragma GCC unroll 8
  for (size_t i = 1; i < B; ++i) h = fma(h, broadcast(2.0f), sums[i]);
  return fma(load_strided(gain + g, a.groups), h, y);
}

ANYBIT_INLINE float zero_at(const Affine& a, size_t bits, size_t at) {
  if (a.fraction) return half(a.fraction[at]) + a.zero_add;
  return (a.zero ? static_cast<float>(a.zero[at]) : static_cast<float>(1u << (bits - 1))) + a.zero_add;
}

ANYBIT_INLINE void load_factors(const Planes& p, const Affine& a, size_t n, size_t lanes, float* gain, float* offset) {
  const float middle = 0.5f * static_cast<float>((1u << p.bits) - 1);
  halves(a.scale + n * a.groups, gain, lanes * a.groups);
  for (size_t i = 0; i < lanes * a.groups; ++i) {
    gain[i] *= a.scale_mul;
    offset[i] = gain[i] * (middle - zero_at(a, p.bits, n * a.groups + i));
    gain[i] *= 0.5f;
  }
}

// Binary-coded: y += sum_i gain_i S_i, gain = alpha [kLanes][groups][B].
template <size_t B>
ANYBIT_INLINE Floats add_planes(const BinaryCoded& w, const float* gain, size_t g, const Floats (&sums)[B], Floats y) {
#pragma GCC unroll 8
  for (size_t i = 0; i < B; ++i) y = fma(load_strided(gain + g * B + i, w.groups * B), sums[i], y);
  return y;
}

ANYBIT_INLINE void load_factors(const Planes& p, const BinaryCoded& w, size_t n, size_t lanes, float* gain, float* offset) {
  halves(w.alpha + n * w.groups * p.bits, gain, lanes * w.groups * p.bits);
  if (w.offset) halves(w.offset + n * w.groups, offset, lanes * w.groups);
}

ANYBIT_INLINE bool has_offset(const Affine&) { return true; }
ANYBIT_INLINE bool has_offset(const BinaryCoded& w) { return w.offset; }

template <size_t B, class Weight>
ANYBIT_INLINE Floats row_block_dot(const Planes& p, const Weight& w, size_t n, size_t lanes, const Token& token,
                                   const float* gain, const float* offset) {
  Floats y = broadcast(0.0f), sums[B];
  const float* tables = token.tables;
  for (size_t g = 0; g < w.groups; ++g) {
    const size_t start = g * w.group_size, end = least(start + w.group_size, p.columns);
    const size_t first = start / 4, last = (end + 3) / 4;
    group_sums<B>(p, n, lanes, tables, first, last, sums);
    y = add_planes<B>(w, gain, g, sums, y);
    if (has_offset(w)) y = fma(load_strided(offset + g, w.groups), broadcast(token.sums[g]), y);
    tables += (last - first) * 16;
  }
  return y;
}

template <size_t B, class Weight>
void rows_of_width(const Planes& p, const Weight& w, const Token* tokens, size_t count, float* scratch, float* y, size_t begin,
                   size_t end) {
  float *offset = scratch, *gain = scratch + kLanes * w.groups;
  for (size_t n = begin; n < end; n += kLanes) {
    const size_t lanes = least(kLanes, end - n);
    load_factors(p, w, n, lanes, gain, offset);
    for (size_t t = 0; t < count; ++t)
      store(y + t * p.rows + n, row_block_dot<B>(p, w, n, lanes, tokens[t], gain, offset), lanes);
  }
}

// Values of `count` columns of row n that lie in group g, from their codes.
ANYBIT_INLINE void decode_codes(const Planes& p, const Affine& a, size_t n, size_t g, const std::uint8_t* __restrict codes,
                                size_t count, float* __restrict out) {
  const size_t at = n * a.groups + g;
  const float scale = half(a.scale[at]) * a.scale_mul;
  const float zero = zero_at(a, p.bits, at);
  for (size_t i = 0; i < count; ++i) out[i] = scale * (static_cast<float>(codes[i]) - zero);
}

ANYBIT_INLINE void decode_codes(const Planes& p, const BinaryCoded& w, size_t n, size_t g, const std::uint8_t* __restrict codes,
                                size_t count, float* __restrict out) {
  const size_t at = n * w.groups + g;
  for (size_t k = 0; k < count; ++k) out[k] = 0.0f;
  for (size_t i = 0; i < p.bits; ++i) {
    const float alpha = half(w.alpha[at * p.bits + i]);
    const int shift = static_cast<int>(p.bits - 1 - i);
    for (size_t k = 0; k < count; ++k) out[k] += alpha * static_cast<float>((codes[k] >> shift & 1) * 2 - 1);
  }
  const float offset = w.offset ? half(w.offset[at]) : 0.0f;
  for (size_t k = 0; k < count; ++k) out[k] += offset;
}

void build_tables(const float* x, size_t columns, size_t group_size, float* tables, float* sums) {
  for (size_t start = 0; start < columns; start += group_size) {
    const size_t end = least(start + group_size, columns);
    float sum = 0.0f;
    for (size_t cell = start / 4; cell < (end + 3) / 4; ++cell, tables += 16) {
      float v[4];  // columns of other groups and padding count as zero, so their bits do not matter
      for (size_t j = 0; j < 4; ++j) {
        const size_t k = cell * 4 + j;
        v[j] = k >= start && k < end ? x[k] : 0.0f;
      }
      const float low[4] = {-v[0] - v[1], v[0] - v[1], v[1] - v[0], v[0] + v[1]};
      const float high[4] = {-v[2] - v[3], v[2] - v[3], v[3] - v[2], v[2] + v[3]};
      for (size_t i = 0; i < 16; ++i) tables[i] = high[i / 4] + low[i % 4];
      sum += high[3] + low[3];
    }
    *sums++ = sum;
  }
}

template <class Weight>
void linear_rows(const Planes& planes, const Weight& weight, const Token* tokens, size_t count, float* scratch, float* y,
                 size_t begin, size_t end) {
  constexpr decltype(&rows_of_width<1, Weight>) by_width[] = {
      rows_of_width<1, Weight>, rows_of_width<2, Weight>, rows_of_width<3, Weight>, rows_of_width<4, Weight>,
      rows_of_width<5, Weight>, rows_of_width<6, Weight>, rows_of_width<7, Weight>, rows_of_width<8, Weight>};
  by_width[planes.bits - 1](planes, weight, tokens, count, scratch, y, begin, end);
}

template <class Weight>
void decode_rows(const Planes& planes, const Weight& weight, float* values, size_t begin, size_t end) {
  constexpr size_t kChunk = 4 * 64;  // columns: codes stay in the first-level cache between the two passes
  std::uint8_t codes[kChunk];
  for (size_t n = begin; n < end; ++n, values += planes.columns) {
    size_t g = 0;
    for (size_t chunk = 0; chunk < planes.columns; chunk += kChunk) {
      const size_t stop = least(chunk + kChunk, planes.columns);
      for (size_t k = chunk; k < stop; k += kCodes) expand_columns(planes, n, k, least(kCodes, stop - k), codes + k - chunk);
      for (size_t k = chunk; k < stop;) {
        if (k == (g + 1) * weight.group_size) ++g;
        const size_t last = least((g + 1) * weight.group_size, stop);
        decode_codes(planes, weight, n, g, codes + k - chunk, last - k, values + k);
        k = last;
      }
    }
  }
}

}  // namespace

extern const LinearA16Table linear_w_a16_table = {
    kLanes, build_tables, {decode_rows<Affine>, linear_rows<Affine>}, {decode_rows<BinaryCoded>, linear_rows<BinaryCoded>}};

}  // namespace anybit::ANYBIT_TARGET
