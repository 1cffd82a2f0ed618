#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>

#include "decoder/math.h"
#include "decoder/linear.h"
#include "thread_pool.h"

namespace anybit {
namespace {

constexpr size_t kRowWork = 16 * 1024;  // floats: less is done before a second thread has woken

// The angles of one position: [pairs] cosines and sines.
void angles(const Rope& rope, size_t position, float* cosine, float* sine) {
  for (size_t i = 0; i < rope.pairs; ++i) {
    const float angle = static_cast<float>(position) * rope.inverse[i];
    cosine[i] = std::cos(angle) * rope.factor;
    sine[i] = std::sin(angle) * rope.factor;
  }
}

}  // namespace

template <class Body>
void Decoder::each_row(size_t width, Body&& body) {
  auto rows = [&](size_t begin, size_t end) noexcept {
    for (size_t t = begin; t < end; ++t) body(t);
  };
  parallel_for(rows_, std::max<size_t>(1, kRowWork / width), rows);
}

void Decoder::pass(const std::int32_t* tokens, const std::int32_t* slots, size_t rows) {
  rows_ = rows;
  for (size_t t = 0; t < rows; ++t) {
    work_.slot[t] = static_cast<std::uint32_t>(slots[t]);
    work_.position[t] = static_cast<std::uint32_t>(cache_.append(work_.slot[t]));
  }
  embed(tokens);
  for (size_t index = 0; index < model_.layers.size(); ++index) {
    attention(model_.layers[index], index);
    mlp(model_.layers[index]);
  }
}

void Decoder::embed(const std::int32_t* tokens) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  const auto embed_row = ANYBIT_ACTIVE(embedding_table).embed_row;
  const Embedding& from = model_.embedding;
  const size_t pairs = Workspace::most_pairs(model_), ropes = model_.ropes.size();
  each_row(model_.hidden, [&](size_t t) {
    const auto id = static_cast<size_t>(tokens[t]);
    float* row = work_.hidden.data() + t * model_.hidden;
    if (from.kind == Embedding::Kind::planes) {
      embed_row(from.planes, from.affine, id, model_.embedding_scale, row);
    } else {
      math.float_row(from, id, model_.embedding_scale, model_.hidden, row);
    }
    for (size_t r = 0; r < ropes; ++r) {
      const size_t at = (t * ropes + r) * pairs;
      angles(model_.ropes[r], work_.position[t], work_.cosine.data() + at, work_.sine.data() + at);
    }
  });
}

void Decoder::attention(const Layer& layer, size_t index) {
  linear(layer.qkv, rows_, work_.qkv.data(), [&](const Activations& x) {
    rms_norm_quantize_rows(work_.hidden.data(), layer.input_norm, false, model_.epsilon, x, 0, rows_);
  });
  place_heads(layer, index);
  attend(cache_.shape(), work_.query.data(), work_.queries.data(), rows_, model_.attention_scale, model_.attention_softcap,
         work_.mixed.data());
  linear(layer.output, rows_, work_.added.data(), [&](const Activations& x) { quantize_rows(work_.mixed.data(), x, 0, rows_); });
  add_residual(layer.attention_out_norm);
}

void Decoder::place_heads(const Layer& layer, size_t index) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  const auto norm_head = ANYBIT_ACTIVE(quantize_activations_table).rms_norm;
  const size_t dim = model_.head_dim, pairs = Workspace::most_pairs(model_);
  const Rope& rope = model_.ropes[layer.rope];
  each_row(model_.qkv_width(), [&](size_t t) {
    const size_t at = (t * model_.ropes.size() + layer.rope) * pairs, position = work_.position[t];
    float* x = work_.qkv.data() + t * model_.qkv_width();
    const auto turn = [&](size_t heads, const float* weight, float* out) {
      for (size_t head = 0; head < heads; ++head, x += dim, out += dim) {
        if (weight) norm_head(x, {weight, false, model_.epsilon}, x, dim);
        math.rotate(x, work_.cosine.data() + at, work_.sine.data() + at, rope.pairs, dim, out);
      }
    };
    turn(model_.heads, layer.query_norm, work_.query.data() + t * model_.query_width());
    turn(model_.kv_heads, layer.key_norm, work_.key.data() + t * model_.kv_width());
    std::copy_n(x, model_.kv_width(), work_.value.data() + t * model_.kv_width());
    const size_t first = layer.window && position >= layer.window ? position + 1 - layer.window : 0;
    work_.queries[t] = {cache_.pages(index, work_.slot[t]), first, position};
  });
  kv_write(cache_.shape(), work_.queries.data(), rows_, work_.key.data(), work_.value.data());
}

void Decoder::mlp(const Layer& layer) {
  linear(layer.gate_up, rows_, work_.gate_up.data(), [&](const Activations& x) {
    rms_norm_quantize_rows(work_.hidden.data(), layer.mlp_norm, false, model_.epsilon, x, 0, rows_);
  });
  linear(layer.down, rows_, work_.added.data(), [&](const Activations& x) {
    gate_quantize_rows(work_.gate_up.data(), model_.gelu ? Gate::gelu_tanh : Gate::silu, x, 0, rows_);
  });
  add_residual(layer.mlp_out_norm);
}

void Decoder::add_residual(const float* weight) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  const size_t width = model_.hidden;
  if (weight) rms_norm_rows(work_.added.data(), weight, false, model_.epsilon, work_.added.data(), width, 0, rows_);
  each_row(width, [&](size_t t) { math.add(work_.hidden.data() + t * width, work_.added.data() + t * width, width); });
}

}  // namespace anybit
