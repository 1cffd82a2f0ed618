// Element-wise arithmetic of a decoder: the same operations in the same order on every instruction set, so results are equal
// bit for bit (no fused multiply-add, no library exp).
#pragma once

#include "decoder/model.h"
#include "targets.h"

namespace anybit {

struct DecoderMath {
  // Row `id` of a float embedding times `scale`: out [hidden].
  void (*float_row)(const Embedding& embedding, size_t id, float scale, size_t hidden, float* out);
  // out = x with channels i and i + pairs turned by the angle of cosine[i], sine[i]; channels from 2 pairs to `count` are copied.
  // `out` may be x.
  void (*rotate)(const float* x, const float* cosine, const float* sine, size_t pairs, size_t count, float* out);
  // x = x H / sqrt(count), H the Hadamard matrix of `count`, a power of 2.
  void (*hadamard)(float* x, size_t count);
  void (*add)(float* x, const float* y, size_t count);
  // x[i] = cap * tanh(x[i] / cap).
  void (*softcap)(float* x, float cap, size_t count);
};
ANYBIT_FOR_TARGETS(extern const DecoderMath decoder_math;)

}  // namespace anybit
