// log2(block) passes of sums and differences at distances 1, 2, 4, ... of one block; the reference is reference.py.
//
// Two distances at a time, so that a block is read and written half as often. Numbers: NOTES.md.
#include "cpu.h"

#include <cmath>
#include <vector>

#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

ANYBIT_INLINE void butterfly(Vec& a, Vec& b) {
  const Vec sum = a + b;
  b = a - b, a = sum;
}

// A distance of at least a vector, whole vectors against each other.
void far(float* x, size_t block, size_t distance) {
  for (size_t start = 0; start < block; start += 2 * distance)
    for (size_t i = start; i < start + distance; i += kWidth) {
      Vec a = load(x + i), b = load(x + i + distance);
      butterfly(a, b);
      store(x + i, a), store(x + i + distance, b);
    }
}

void far_twice(float* x, size_t block, size_t distance) {
  for (size_t start = 0; start < block; start += 4 * distance)
    for (size_t i = start; i < start + distance; i += kWidth) {
      Vec a = load(x + i), b = load(x + i + distance), c = load(x + i + 2 * distance), d = load(x + i + 3 * distance);
      butterfly(a, b), butterfly(c, d), butterfly(a, c), butterfly(b, d);
      store(x + i, a), store(x + i + distance, b), store(x + i + 2 * distance, c), store(x + i + 3 * distance, d);
    }
}

ANYBIT_INLINE Vec permuted(Vec v, Ints from) {
#if defined(__clang__)
  Vec out;
  for (size_t i = 0; i < kWidth; ++i) out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

// Distances within a vector: lane i against lane i ^ distance.
template <size_t kDistance>
ANYBIT_INLINE Vec near(Vec v) {
  Ints partner, flip;
  for (size_t i = 0; i < kWidth; ++i) {
    partner[i] = static_cast<int>(i ^ kDistance);
    flip[i] = i & kDistance ? static_cast<std::int32_t>(0x80000000u) : 0;
  }
  return permuted(v, partner) + from_bits(bits_of(v) ^ flip);
}

void within_vectors(float* x, size_t block) {
  for (size_t i = 0; i < block; i += kWidth) {
    Vec v = near<2>(near<1>(load(x + i)));
    if constexpr (kWidth > 4) v = near<4>(v);
    if constexpr (kWidth > 8) v = near<8>(v);
    store(x + i, v);
  }
}

void small(float* x, size_t block) {
  for (size_t distance = 1; distance < block; distance *= 2)
    for (size_t i = 0; i < block; ++i)
      if (!(i & distance)) {
        const float a = x[i], b = x[i + distance];
        x[i] = a + b, x[i + distance] = a - b;
      }
}

void sums_and_differences(float* row, size_t columns, size_t block) {
  for (float* x = row; x < row + columns; x += block) {
    if (block < kWidth) {
      small(x, block);
      continue;
    }
    within_vectors(x, block);
    size_t distance = kWidth;
    for (; 4 * distance <= block; distance *= 4) far_twice(x, block, distance);
    if (distance < block) far(x, block, distance);
  }
}

void transform(float* row, size_t columns, size_t block) {
  sums_and_differences(row, columns, block);
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (size_t k = 0; k < columns; ++k) row[k] *= scale;
}

// x [order, power] becomes F^T x * scale: column by column, so many at a time as a vector holds.
void mix(float* x, const Rotation& by, float scale, float* out) {
  for (size_t to = 0; to < by.order; ++to)
    for (size_t b = 0; b < by.power; b += kWidth) {
      const size_t n = by.power - b < kWidth ? by.power - b : kWidth;
      Vec sum = {};
      for (size_t from = 0; from < by.order; ++from) {
        const float* at = x + from * by.power + b;
        sum += (n < kWidth ? load_some(at, n) : load(at)) * by.factor[from * by.order + to];
      }
      store_some(out + to * by.power + b, sum * scale, n);
    }
  std::memcpy(x, out, by.order * by.power * sizeof *x);
}

void rotate(float* row, size_t columns, const Rotation& by) {
  if (by.order == 1) return transform(row, columns, by.power);
  static thread_local std::vector<float> memory;
  const size_t block = by.order * by.power;
  if (memory.size() < block) memory.resize(block);
  sums_and_differences(row, columns, by.power);
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (float* x = row; x < row + columns; x += block) mix(x, by, scale, memory.data());
}

}  // namespace

extern const HadamardTable hadamard_table = {transform, rotate};

}  // namespace anybit::ANYBIT_TARGET
