// How the decoder runs a Linear: inputs are quantized by whoever makes them, straight from norm or gate.
#pragma once

#include "decoder/decoder.h"
#include "decoder/math.h"

namespace anybit {

inline Activations Decoder::activations(const TiledWeight& weight, size_t rows) {
  return {work_.codes.data(), work_.scale.data(), work_.sums.data(), rows, weight.columns, activation_stride(weight.columns),
          weight.group_size,  weight.groups};
}

template <class Fill>
void Decoder::linear(const Linear& linear, size_t rows, float* y, Fill&& fill) {
  Activations x{};
  for (const auto& part : linear.parts) {
    const TiledWeight weight = at_precision(part.weight, bits_);
    if (x.group_size != weight.group_size) {
      x = activations(weight, rows);
      fill(x);
    }
    linear_w_a8(weight, x, y + part.offset, linear.rows);
  }
  if (!linear.bias) return;
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  for (size_t t = 0; t < rows; ++t) math.add(y + t * linear.rows, linear.bias, linear.rows);
}

}  // namespace anybit
