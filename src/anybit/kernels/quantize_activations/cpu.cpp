// float32 rows to int8 codes, RMSNorm and gated activations; the reference is reference.py.
//
// Only + - * / and sqrt in a fixed order, no fused multiply-add: the results are the same bits on every instruction set.
// Numbers: NOTES.md.
#include "cpu.h"

#include <cmath>
#include <limits>

#include "rounding.h"

namespace anybit::ANYBIT_TARGET {
namespace {

// Codes of one group and their sum. |x * factor| is at most 127 (1 + 2^-23), so rounding cannot leave -127..127.
ANYBIT_INLINE std::int32_t round_group(const float* x, float factor, size_t count, std::int8_t* codes) {
  Ints sum = {};
  size_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    const Ints code = bits_of(load(x + k) * factor + kRound) - kRoundBits;
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(codes + k, &bytes, sizeof bytes);
    sum += code;
  }
  if (k < count) {
    const Ints code = bits_of(load_some(x + k, count - k) * factor + kRound) - kRoundBits;
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    std::memcpy(codes + k, &bytes, count - k);
    sum += code;
  }
  return sum_of(sum);
}

ANYBIT_INLINE void quantize_group(const float* x, const Activations& out, size_t token, size_t g, size_t count) {
  std::int8_t* codes = out.codes + token * out.stride + g * out.group_size;
  const std::int32_t bits = largest_magnitude(x, count);
  float amax, scale = 0, sum = 0;
  std::memcpy(&amax, &bits, sizeof amax);
  if (bits >= kNothing && bits < kInfinite) {
    scale = amax / 127.0f;
    sum = static_cast<float>(round_group(x, 127.0f / amax, count, codes));
  } else {
    std::memset(codes, 0, count);
    if (bits >= kInfinite) scale = std::numeric_limits<float>::quiet_NaN();
  }
  out.scale[token * out.groups + g] = scale, out.sums[token * out.groups + g] = sum;
}

void quantize(const float* x, const Activations& out, size_t token) {
  constexpr size_t kCommon = 32;  // with the count known, a group is straight code: half the time
  size_t g = 0;
  if (out.group_size == kCommon)
    for (; (g + 1) * kCommon <= out.columns; ++g) quantize_group(x + g * kCommon, out, token, g, kCommon);
  for (; g < out.groups; ++g) {
    const size_t begin = g * out.group_size, left = out.columns - begin;
    quantize_group(x + begin, out, token, g, left < out.group_size ? left : out.group_size);
  }
  std::memset(out.codes + token * out.stride + out.columns, 0, out.stride - out.columns);
}

// The mean of squares as 64 running sums (column k goes to sum k % 64), whatever the width of a vector.
float mean_square(const float* x, size_t columns) {
  constexpr size_t kSums = 64, kVectors = kSums / kWidth;
  Vec sums[kVectors] = {};
  size_t k = 0;
  for (; k + kSums <= columns; k += kSums)
    for (size_t j = 0; j < kVectors; ++j) {
      const Vec v = load(x + k + j * kWidth);
      sums[j] += v * v;
    }
  for (size_t j = 0; k < columns; ++j, k += kWidth) {
    const Vec v = columns - k < kWidth ? load_some(x + k, columns - k) : load(x + k);
    sums[j] += v * v;
  }
  for (size_t half = kVectors / 2; half; half /= 2)
    for (size_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sum_of(sums[0]) / static_cast<float>(columns);
}

template <class Weight>
ANYBIT_INLINE void scale_row(const float* x, float factor, float* y, size_t columns, Weight weight) {
  size_t k = 0;
  for (; k + kWidth <= columns; k += kWidth) store(y + k, load(x + k) * factor * weight(k, kWidth));
  if (k < columns) store_some(y + k, load_some(x + k, columns - k) * factor * weight(k, columns - k), columns - k);
}

void rms_norm(const float* x, const RmsNorm& norm, float* y, size_t columns) {
  const float mean = mean_square(x, columns);
  const float factor =
      mean <= std::numeric_limits<float>::max() ? 1.0f / std::sqrt(mean + norm.eps) : std::numeric_limits<float>::quiet_NaN();
  const float *w = norm.weight, one = norm.plus_one ? 1.0f : 0.0f;
  if (!w) return scale_row(x, factor, y, columns, [](size_t, size_t) { return all(1.0f); });
  scale_row(x, factor, y, columns,
            [w, one](size_t k, size_t n) { return one + (n < kWidth ? load_some(w + k, n) : load(w + k)); });
}

// e^v: v = n ln 2 + r with |r| <= ln 2 / 2, a Taylor polynomial of degree 7 in r (error below 1e-8), n added to the exponent.
// Overflows to infinity from v = 88.4; below -87 it stays at e^-87. NaN stays NaN.
ANYBIT_INLINE Vec exponential(Vec v) {
  v = v > 88.7f ? all(88.7f) : v;
  v = v < -87.0f ? all(-87.0f) : v;
  const Vec shifted = v * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  // ln 2 in two parts, the first of so few bits that n times it is exact.
  const Vec r = (v - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const auto exponent = (VectorOf<std::uint32_t, kWidth>::type)(bits_of(shifted) - (kRoundBits - 127));
  return p * (Vec)(exponent << 23);
}

// Both gates are g * sigmoid(z): z = g, or 2 sqrt(2 / pi) (g + 0.044715 g^3), since (1 + tanh z) / 2 = sigmoid(2 z).
template <Gate kGate>
ANYBIT_INLINE Vec activated(Vec g) {
  const Vec z = kGate == Gate::silu ? g : g * (1.59576912f + 0.0713548163f * (g * g));
  return g / (1.0f + exponential(-z));
}

template <Gate kGate>
void gate_row(const float* gates, float* y, size_t columns) {
  const float* ups = gates + columns;
  size_t k = 0;
  for (; k + kWidth <= columns; k += kWidth) store(y + k, activated<kGate>(load(gates + k)) * load(ups + k));
  const size_t left = columns - k;
  if (left) store_some(y + k, activated<kGate>(load_some(gates + k, left)) * load_some(ups + k, left), left);
}

void gate(const float* gate_up, Gate gate, float* y, size_t columns) {
  (gate == Gate::silu ? gate_row<Gate::silu> : gate_row<Gate::gelu_tanh>)(gate_up, y, columns);
}

}  // namespace

extern const QuantizeActivationsTable quantize_activations_table = {quantize, rms_norm, gate};

}  // namespace anybit::ANYBIT_TARGET
