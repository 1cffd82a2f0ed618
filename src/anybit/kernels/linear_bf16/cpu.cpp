// Rows of bfloat16 against one to four tokens, two rows at a time: the weights are two streams. A bfloat16 is the upper half
// of a float32, so a word of two is the odd column after a mask and the even one after a shift; x is laid out to match.
// Numbers: NOTES.md.
#include "cpu.h"

#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr size_t kStep = 2 * kWidth;  // columns of one load of weights
constexpr size_t kLoads = 2;          // of one row per turn, with sums of their own, to hide the latency of an addition
constexpr size_t kRows = 2;           // that share what is loaded of x: more than one token does not fit the first-level cache
constexpr size_t kAhead = 2048;       // bytes: the processor's own prefetching stops at page ends

size_t prepared_floats(size_t columns) { return (columns + kStep - 1) / kStep * kStep; }

// The even columns of a step, then its odd ones; zeros after the last column.
void prepare(const float* x, size_t columns, float* out) {
  for (size_t k = 0; k < prepared_floats(columns); ++k) {
    const float v = k < columns ? x[k] : 0.0f;
    out[k / kStep * kStep + k % 2 * kWidth + k % kStep / 2] = v;
  }
}

struct Pair {
  Vec even, odd;
};

ANYBIT_INLINE Pair split(Ints words) {
  const auto bits = (VectorOf<std::uint32_t, kWidth>::type)words;
  return {(Vec)(bits << 16), (Vec)(bits & 0xFFFF0000u)};
}

ANYBIT_INLINE Vec step(Pair w, const float* x, Vec sum) {
  return multiply_add(w.odd, load(x + kWidth), multiply_add(w.even, load(x), sum));
}

ANYBIT_INLINE Pair weights(const std::uint16_t* w, size_t count) {
  Ints words = {};
  if (count >= kStep)
    std::memcpy(&words, w, sizeof words);
  else
    std::memcpy(&words, w, count * sizeof *w);
  return split(words);
}

template <size_t kTokens, size_t kCount>
ANYBIT_INLINE void some_rows(const std::uint16_t* w, const float* x, size_t rows, size_t columns, float* y) {
  const size_t pitch = prepared_floats(columns);
  Vec sums[kCount][kTokens][kLoads] = {};
  size_t k = 0;
  for (; k + kLoads * kStep <= columns; k += kLoads * kStep)
    for (size_t n = 0; n < kCount; ++n)
      for (size_t j = 0; j < kLoads; ++j) {
        const size_t at = k + j * kStep;
        if (at % 32 == 0) __builtin_prefetch(reinterpret_cast<const char*>(w + n * columns + at) + kAhead);
        const Pair pair = weights(w + n * columns + at, kStep);
        for (size_t t = 0; t < kTokens; ++t) sums[n][t][j] = step(pair, x + t * pitch + at, sums[n][t][j]);
      }
  for (; k < columns; k += kStep)
    for (size_t n = 0; n < kCount; ++n) {
      const Pair pair = weights(w + n * columns + k, columns - k);
      for (size_t t = 0; t < kTokens; ++t) sums[n][t][0] = step(pair, x + t * pitch + k, sums[n][t][0]);
    }
  for (size_t n = 0; n < kCount; ++n)
    for (size_t t = 0; t < kTokens; ++t) y[t * rows + n] = sum_of(sums[n][t][0] + sums[n][t][1]);
}

template <size_t kTokens>
void rows_of(const std::uint16_t* weight, const float* x, size_t rows, size_t columns, float* y, size_t begin, size_t end) {
  size_t n = begin;
  for (; n + kRows <= end; n += kRows) some_rows<kTokens, kRows>(weight + n * columns, x, rows, columns, y + n);
  for (; n < end; ++n) some_rows<kTokens, 1>(weight + n * columns, x, rows, columns, y + n);
}

void rows(const std::uint16_t* weight, const float* x, size_t tokens, size_t rows, size_t columns, float* y, size_t begin,
          size_t end) {
  switch (tokens) {
    case 1: return rows_of<1>(weight, x, rows, columns, y, begin, end);
    case 2: return rows_of<2>(weight, x, rows, columns, y, begin, end);
    case 3: return rows_of<3>(weight, x, rows, columns, y, begin, end);
    default: return rows_of<4>(weight, x, rows, columns, y, begin, end);
  }
}

}  // namespace

extern const LinearBf16Table linear_bf16_table = {prepared_floats, prepare, rows};

}  // namespace anybit::ANYBIT_TARGET
