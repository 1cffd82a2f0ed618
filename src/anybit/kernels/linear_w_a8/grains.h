// Dual-grained weights: groups are scaled in integers. A few tokens take the planes and scale each group's sum; many tokens take
// the inner products as bytes, expanded once a strip, and see a weight with one group a row. Both are the same integers.
#pragma once

#include <vector>

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr std::uint8_t kByteZero = 128;  // added to inner products where codes must not be negative

// 16 rows for T tokens from `token`: total += grain (sum - zero * sum of activations), all in int32.
template <size_t T, class Source>
ANYBIT_INLINE void multiply_grains(const Source& source, const TiledWeight& w, const Activations& x, const Output& out, size_t block,
                                   size_t token) {
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  const std::int8_t* xs = x.codes + token * x.stride;
  Ints total[T][1];
  clear(total);
  for (size_t g = 0, chunk = 0; g < w.groups; ++g) {
    Ints sum[T][1];
    clear(sum);
    for (const size_t end = least(chunk + per_group, chunks); chunk < end; ++chunk) {
      Codes codes[kQuads];
      source.load(chunk, codes);
#pragma GCC unroll 8
      for (size_t q = 0; q < kQuads; ++q)
#pragma GCC unroll 8
        for (size_t t = 0; t < T; ++t)
          dot<Source::kLines>(sum[t][0], codes[q], xs + t * x.stride + chunk * TiledWeight::kColumns + 4 * q);
    }
    const size_t at = block * w.groups + g;
    const std::uint8_t *grain = w.grain + at * TiledWeight::kRows, *zero = w.zero + at * w.zero_bytes;
    __builtin_prefetch(grain + kZeroAhead), __builtin_prefetch(zero + kZeroAhead);
    const Ints scale = to_ints(load_bytes(grain)), middle = to_ints(w.zero_bytes == 8 ? load_nibbles(zero) : load_bytes(zero));
#pragma GCC unroll 8
    for (size_t t = 0; t < T; ++t) {
      const auto x_sum = static_cast<std::int32_t>(x.sums[(token + t) * x.groups + g]);
      total[t][0] = add(total[t][0], mul(scale, subtract(sum[t][0], middle, x_sum)));
    }
  }
  const size_t first = block * TiledWeight::kRows, lanes = least(TiledWeight::kRows, w.rows - first);
  const Reals scale = out.sums ? splat(0.0f) : mul(load_halves(w.scale + first), splat(w.scale_mul));
  for (size_t t = 0; t < T; ++t) {
    if (out.sums) {
      store(out.sums + (token + t) * w.rows + first, total[t][0], lanes);
      continue;
    }
    const Reals factor = mul(scale, splat(x.scale[(token + t) * x.groups]));
    store(out.y + (token + t) * out.y_stride + first, fma(factor, to_reals(total[t][0]), splat(0.0f)), lanes);
  }
}

template <class Source>
void multiply_all_grains(const Source& source, const TiledWeight& w, const Activations& x, const Output& out, size_t block,
                         size_t begin, size_t end) {
#if !defined(ANYBIT_TARGET_scalar)
  for (; begin + 4 <= end; begin += 4) multiply_grains<4>(source, w, x, out, block, begin);
  if (begin + 2 <= end) multiply_grains<2>(source, w, x, out, block, begin), begin += 2;
#endif
  for (; begin < end; ++begin) multiply_grains<1>(source, w, x, out, block, begin);
}

// The codes of a strip as inner products plus `added`, bytes that wrap: as signed bytes with 0, as codes of zero 128 with 128.
void expand_grains(const TiledWeight& w, size_t block, std::uint8_t added, std::uint8_t* strip) {
  const size_t chunks = w.chunks(), per_group = w.groups == 1 ? chunks : w.group_size / TiledWeight::kColumns;
  alignas(64) std::uint8_t scale[64], zero[64];
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    if (chunk % per_group == 0) {
      const size_t at = block * w.groups + chunk / per_group;
      const std::uint8_t *scales = w.grain + at * TiledWeight::kRows, *zeros = w.zero + at * w.zero_bytes;
      for (size_t i = 0; i < 64; ++i) {
        const size_t r = i / 4;
        const auto packed = zeros[r % w.zero_bytes];
        scale[i] = scales[r];
        zero[i] = static_cast<std::uint8_t>(w.zero_bytes == 8 ? packed >> (r < 8 ? 0 : 4) & 15 : packed);
      }
    }
    std::uint8_t* codes = strip + chunk * kQuads * 64;
    for (size_t q = 0; q < kQuads; ++q)
      for (size_t i = 0; i < 64; ++i)
        codes[q * 64 + i] = static_cast<std::uint8_t>((codes[q * 64 + i] - zero[i]) * scale[i] + added);
  }
}

// What a strip of bytes is a strip of: an 8-bit weight with one group a row, and activations to match. Other weights and their
// activations stay what they are.
struct RowView {
  TiledWeight w;
  Activations x;

  RowView(const TiledWeight& stored, const Activations& given, size_t begin, size_t end) : w(stored), x(given) {
    if (!stored.grain) return;
    w.grain = nullptr, w.zero = nullptr, w.bits = 8;
    w.group_size = w.columns, w.groups = 1, w.zero_mul = 1.0f, w.zero_add = kByteZero;
    static thread_local std::vector<float> memory;
    if (memory.size() < 2 * given.tokens) memory.resize(2 * given.tokens);
    x.scale = memory.data(), x.sums = x.scale + given.tokens, x.group_size = x.columns, x.groups = 1;
    for (size_t t = begin; t < end; ++t) {
      x.scale[t] = given.scale[t * given.groups], x.sums[t] = 0.0f;
      for (size_t g = 0; g < given.groups; ++g) x.sums[t] += given.sums[t * given.groups + g];
    }
  }
};

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
