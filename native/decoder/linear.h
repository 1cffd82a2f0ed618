// How the decoder shares out rows and runs a Linear: inputs are quantized by whoever makes them, straight from norm or gate.
#pragma once

#include <algorithm>

#include "decoder/decoder.h"
#include "decoder/math.h"
#include "thread_pool.h"

namespace anybit {

constexpr size_t kRowWork = 4 * 1024;  // floats: less is not worth asking a second thread, which looks for work while a step is made

// body(t) for rows t < rows of `width` floats each.
template <class Body>
void each_row(size_t rows, size_t width, Body&& body) {
  auto range = [&](size_t begin, size_t end) noexcept {
    for (size_t t = begin; t < end; ++t) body(t);
  };
  parallel_for(rows, std::max<size_t>(1, kRowWork / width), range);
}

inline Activations Decoder::activations(const TiledWeight& weight, size_t rows) {
  return {work_.codes.data(), work_.scale.data(), work_.sums.data(), rows, weight.columns, activation_stride(weight.columns),
          weight.group_size,  weight.groups};
}

template <class Make>
void Decoder::linear(const Linear& linear, size_t rows, bool halves, float* y, float* input, size_t stride, Make&& make) {
  const QuantizeActivationsTable& k = ANYBIT_ACTIVE(quantize_activations_table);
  const auto round = ANYBIT_ACTIVE(linear_w_bf16_table).round_row;
  const auto rotate = ANYBIT_ACTIVE(hadamard_table).rotate;
  const HalfActivations rounded{work_.halves.data(), rows, linear.columns, half_stride(linear.columns)};
  Activations x{};  // in work_: codes for the last scheme and group, and bfloat16
  size_t scheme = kNoScheme;
  bool made = false, have_halves = false;
  for (const auto& part : linear.parts) {
    const TiledWeight& weight = part.at(bits_);
    *read_ += weight.bytes() + part.side.bytes();
    const bool half = halves && part.scheme == kNoScheme;
    if (half ? !have_halves : !x.codes || x.group_size != weight.group_size || scheme != part.scheme) {
      if (!half) x = activations(weight, rows), scheme = part.scheme;
      const Scheme* by = scheme == kNoScheme ? nullptr : &linear.schemes[scheme];
      const size_t width = by ? by->side_width(linear.columns) : 0;
      each_row(rows, linear.columns, [&](size_t t) {
        float* row = input + t * stride;
        if (!made) {
          make(t);
          if (linear.rotation.power) rotate(row, linear.columns, linear.rotation);
        }
        if (half) round(row, rounded, t);
        else if (by) encode_row(row, *by, x, work_.side.data() + t * width, t);
        else k.quantize(row, x, t);
      });
      made = true, have_halves |= half;
    }
    if (half) linear_w_bf16(weight, rounded, y + part.offset, linear.rows);
    else linear_w_a8_side(weight, x, part.side, work_.side.data(), y + part.offset, linear.rows);
  }
  if (!linear.bias) return;
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  each_row(rows, linear.rows, [&](size_t t) { math.add(y + t * linear.rows, linear.bias, linear.rows); });
}

}  // namespace anybit
