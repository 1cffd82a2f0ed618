#include "decoder/math.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

float widened(std::uint16_t bits, Embedding::Kind kind) {
  if (kind == Embedding::Kind::bfloat16) return std::bit_cast<float>(std::uint32_t{bits} << 16);
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

void float_row(const Embedding& embedding, size_t id, float scale, size_t hidden, float* out) {
  if (embedding.kind == Embedding::Kind::float32) {
    std::memcpy(out, static_cast<const float*>(embedding.rows) + id * hidden, hidden * sizeof(float));
  } else {
    const auto* row = static_cast<const std::uint16_t*>(embedding.rows) + id * hidden;
    for (size_t k = 0; k < hidden; ++k) out[k] = widened(row[k], embedding.kind);
  }
  for (size_t k = 0; k < hidden; ++k) out[k] *= scale;
}

void rotate(const float* x, const float* cosine, const float* sine, size_t pairs, size_t count, float* out) {
  size_t i = 0;
  for (; i + kWidth <= pairs; i += kWidth) {
    const Vec low = load(x + i), high = load(x + i + pairs), c = load(cosine + i), s = load(sine + i);
    store(out + i, low * c - high * s);
    store(out + i + pairs, high * c + low * s);
  }
  for (; i < pairs; ++i) {
    const float low = x[i], high = x[i + pairs];
    out[i] = low * cosine[i] - high * sine[i];
    out[i + pairs] = high * cosine[i] + low * sine[i];
  }
  if (out != x) std::memcpy(out + 2 * pairs, x + 2 * pairs, (count - 2 * pairs) * sizeof *x);
}

// Sums and differences of lower and upper halves of runs, from the widest: one order on every instruction set.
void hadamard(float* x, size_t count) {
  for (size_t step = count / 2; step >= 1; step /= 2)
    for (size_t first = 0; first < count; first += 2 * step)
      for (size_t i = first; i < first + step; ++i) {
        const float low = x[i], high = x[i + step];
        x[i] = low + high, x[i + step] = low - high;
      }
  const float scale = 1.0f / std::sqrt(static_cast<float>(count));
  for (size_t i = 0; i < count; ++i) x[i] *= scale;
}

void add(float* __restrict x, const float* __restrict y, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] += y[i];
}

// e^x within 2 ulp, for x clamped to where the result is a normal float; NaN stays NaN. Plain arithmetic: the compiler
// vectorizes it.
ANYBIT_INLINE float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n ln 2, in two parts
  float p = 1.9875691500e-4f;                                   // the polynomial of Cephes expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const auto exponent = (std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(kRound)) << 23;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(p) + exponent);
}

void softcap(float* x, float cap, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const float capped = cap - 2.0f * cap / (exponential(x[i] / cap * 2.0f) + 1.0f);
    x[i] = x[i] == x[i] ? capped : x[i];
  }
}

}  // namespace

extern const DecoderMath decoder_math = {float_row, rotate, hadamard, add, softcap};

}  // namespace anybit::ANYBIT_TARGET
