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
void Decoder::linear(const Linear& linear, size_t rows, bool halves, float* y, const float* input, size_t stride, Make&& make) {
  const auto quantize = ANYBIT_ACTIVE(quantize_activations_table).quantize;
  const auto round = ANYBIT_ACTIVE(linear_w_bf16_table).round_row;
  const HalfActivations rounded{work_.halves.data(), rows, linear.columns, half_stride(linear.columns)};
  Activations x{};
  bool made = false;
  for (const auto& part : linear.parts) {
    const TiledWeight& weight = part.at(bits_);
    *read_ += weight.bytes();
    if (!made || (!halves && x.group_size != weight.group_size)) {
      x = activations(weight, rows);
      each_row(rows, linear.columns, [&](size_t t) {
        if (!made) make(t);
        halves ? round(input + t * stride, rounded, t) : quantize(input + t * stride, x, t);
      });
      made = true;
    }
    halves ? linear_w_bf16(weight, rounded, y + part.offset, linear.rows) : linear_w_a8(weight, x, y + part.offset, linear.rows);
  }
  if (!linear.bias) return;
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  each_row(rows, linear.rows, [&](size_t t) { math.add(y + t * linear.rows, linear.bias, linear.rows); });
}

}  // namespace anybit
