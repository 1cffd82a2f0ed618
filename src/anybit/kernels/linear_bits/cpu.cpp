// S[t, n] = sum_ij cu_i cv_j popcount(U_i & V_j) per group, then one epilogue; encoding.py derives it, reference.py defines it.
//
// v1: tiles of rows x tokens; each pair of planes runs over all words of a group into one vector of counts per (row, token),
// pairs of equal coefficient add up before they are multiplied. Everything is an integer of 64 bits until the float result.
#include "cpu.h"

#include "popcount.h"
#include "primitives.h"

namespace anybit::ANYBIT_TARGET {
namespace {

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }

template <size_t R, size_t T>
struct Tile {
  Lanes at[R][T];

  ANYBIT_INLINE void clear() {
#pragma GCC unroll 8
    for (size_t i = 0; i < R * T; ++i) at[i / T][i % T] = zero();
  }
};

// counts += popcounts of plane i of R rows with plane j of T tokens, words [begin, end).
template <size_t R, size_t T>
ANYBIT_INLINE void count_common(const std::uint64_t* u, size_t u_step, const std::uint64_t* v, size_t v_step, size_t begin,
                                size_t end, Tile<R, T>& counts) {
  for (size_t k = begin; k < end; k += kVector) {
    Lanes rows[R];
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) rows[r] = load(u + r * u_step + k);
#pragma GCC unroll 2
    for (size_t t = 0; t < T; ++t) {
      const Lanes token = load(v + t * v_step + k);
#pragma GCC unroll 4
      for (size_t r = 0; r < R; ++r) counts.at[r][t] = step(counts.at[r][t], rows[r], token);
    }
  }
}

// The weighted counts of words [begin, end), per lane.
template <size_t R, size_t T>
ANYBIT_INLINE Tile<R, T> weighted(const BitRows& w, size_t n, const BitRows& x, size_t m, const Schedule& schedule, size_t begin,
                                  size_t end) {
  Tile<R, T> total;
  total.clear();
  size_t pair = 0;
  for (size_t s = 0; s < schedule.count; ++s) {
    Tile<R, T> sum;
    sum.clear();
    for (; pair < schedule.segments[s].end; ++pair) {
      const std::uint64_t *u = w.row(n, schedule.pairs[pair].i), *v = x.row(m, schedule.pairs[pair].j);
      const size_t u_step = w.planes * w.stride, v_step = x.planes * x.stride;
      if constexpr (kRun == 0) {
        count_common(u, u_step, v, v_step, begin, end, sum);
      } else {
        for (size_t k = begin; k < end; k += kRun * kVector) {
          Tile<R, T> part;
          part.clear();
          count_common(u, u_step, v, v_step, k, least(k + kRun * kVector, end), part);
#pragma GCC unroll 8
          for (size_t i = 0; i < R * T; ++i) sum.at[i / T][i % T] = add(sum.at[i / T][i % T], drain(part.at[i / T][i % T]));
        }
      }
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < R * T; ++i)
      total.at[i / T][i % T] = add_scaled(total.at[i / T][i % T], sum.at[i / T][i % T], schedule.segments[s].coefficient);
  }
  return total;
}

// S of every group: sums [R][T][groups]. A group that fills whole vectors is reduced once; lanes of smaller ones are told apart.
template <size_t R, size_t T>
ANYBIT_INLINE void group_sums(const BitWeight& w, size_t n, const BitTokens& x, size_t m, const Schedule& schedule,
                              std::int64_t* sums) {
  const size_t group = w.groups == 1 ? w.bits.stride : w.group_size / 64;
  if (group % kVector == 0) {
    for (size_t g = 0; g < w.groups; ++g) {
      const auto total = weighted<R, T>(w.bits, n, x.bits, m, schedule, g * group, least((g + 1) * group, w.bits.stride));
      for (size_t i = 0; i < R * T; ++i) sums[i * w.groups + g] = lane_sum(total.at[i / T][i % T]);
    }
    return;
  }
  for (size_t i = 0; i < R * T * w.groups; ++i) sums[i] = 0;
  for (size_t k = 0; k < w.bits.stride; k += kVector) {
    const auto total = weighted<R, T>(w.bits, n, x.bits, m, schedule, k, k + kVector);
    for (size_t i = 0; i < R * T; ++i) {
      std::int64_t lanes[kVector];
      store(lanes, total.at[i / T][i % T]);
      // Words of padding lie beyond the last group and count nothing.
      for (size_t lane = 0; lane < kVector; ++lane) sums[i * w.groups + least((k + lane) / group, w.groups - 1)] += lanes[lane];
    }
  }
}

// Row n, token t: groups left to right, one fused multiply-add each, so the result depends on nothing else.
ANYBIT_INLINE void finish(const BitWeight& w, size_t n, const BitTokens& x, size_t t, const std::int64_t* sums,
                          const BitResults& results) {
  float y = 0.0f;
  for (size_t g = 0; g < w.groups; ++g) {
    const size_t at = n * w.groups + g;
    const std::int64_t columns = static_cast<std::int64_t>(least((g + 1) * w.group_size, w.columns) - g * w.group_size);
    const std::int64_t tokens = x.sums[t * w.groups + g] + columns * x.offset;
    const std::int64_t exact = sums[g] + static_cast<std::int64_t>(x.offset) * w.sums[at] + w.offset[at] * tokens;
    if (!results.y) results.integers[(t * w.rows + n) * w.groups + g] = static_cast<std::int32_t>(exact);
    else y = __builtin_fmaf(static_cast<float>(static_cast<std::int32_t>(exact)), w.scale[at] * x.scale[t], y);
  }
  if (results.y) results.y[t * w.rows + n] = y;
}

template <size_t R, size_t T>
void tile(const BitWeight& w, size_t n, const BitTokens& x, size_t m, const Schedule& schedule, std::int64_t* scratch,
          const BitResults& results) {
  group_sums<R, T>(w, n, x, m, schedule, scratch);
  for (size_t i = 0; i < R * T; ++i) finish(w, n + i / T, x, m + i % T, scratch + i * w.groups, results);
}

template <size_t R>
ANYBIT_INLINE void all_tokens(const BitWeight& w, size_t n, const BitTokens& x, const Schedule& schedule, std::int64_t* scratch,
                              const BitResults& results) {
  size_t m = 0;
  for (; m + kTokenTile <= x.count; m += kTokenTile) tile<R, kTokenTile>(w, n, x, m, schedule, scratch, results);
  for (; m < x.count; ++m) tile<R, 1>(w, n, x, m, schedule, scratch, results);
}

void linear_rows(const BitWeight& w, const BitTokens& x, const Schedule& schedule, std::int64_t* scratch,
                 const BitResults& results, size_t begin, size_t end) {
  size_t n = begin;
  for (; n + kRowTile <= end; n += kRowTile) all_tokens<kRowTile>(w, n, x, schedule, scratch, results);
  for (; n < end; ++n) all_tokens<1>(w, n, x, schedule, scratch, results);
}

bool pack_token(const std::uint8_t* codes, bool is_signed, const BitWeight& w, const std::int32_t* coefficients, size_t planes,
                std::uint64_t* words, std::int32_t* sums) {
  const auto bias = static_cast<std::uint8_t>(is_signed ? 1u << (planes - 1) : 0u);
  std::uint8_t seen = 0;
  for (size_t k = 0; k < w.columns; ++k) seen |= static_cast<std::uint8_t>(codes[k] + bias);
  if (seen >> planes) return false;
  auto* bytes = reinterpret_cast<std::uint8_t*>(words);
  for (size_t k = 0; k < w.bits.stride * 64; k += kCodes) {
    alignas(64) std::uint8_t padded[kCodes] = {};
    const bool whole = k + kCodes <= w.columns;
    if (!whole && k < w.columns) std::memcpy(padded, codes + k, w.columns - k);
    for (size_t j = 0; j < planes; ++j)
      collapse(whole ? codes + k : padded, 1u << (planes - 1 - j), bytes + j * w.bits.stride * 8 + k / 8);
  }
  for (size_t g = 0; g < w.groups; ++g) {
    const size_t first = g * w.group_size / 64, last = (least((g + 1) * w.group_size, w.columns) + 63) / 64;
    std::int64_t sum = 0;
    for (size_t j = 0; j < planes; ++j) {
      std::int64_t ones = 0;
      for (size_t k = first; k < last; ++k) ones += std::popcount(words[j * w.bits.stride + k]);
      sum += coefficients[j] * ones;
    }
    sums[g] = static_cast<std::int32_t>(sum);
  }
  return true;
}

}  // namespace

extern const LinearBitsTable linear_bits_table = {kRowTile, pack_token, linear_rows};

}  // namespace anybit::ANYBIT_TARGET
