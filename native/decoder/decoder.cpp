#include "decoder/decoder.h"

#include <algorithm>
#include <cmath>

#include "decoder/math.h"
#include "decoder/linear.h"
#include "thread_pool.h"

namespace anybit {
namespace {

// The angles of one position: [pairs] cosines and sines.
void angles(const Rope& rope, size_t position, float* cosine, float* sine) {
  for (size_t i = 0; i < rope.pairs; ++i) {
    const float angle = static_cast<float>(position) * rope.inverse[i];
    cosine[i] = std::cos(angle) * rope.factor;
    sine[i] = std::sin(angle) * rope.factor;
  }
}

}  // namespace

void Decoder::pass(const std::int32_t* tokens, const std::int32_t* slots, size_t rows, size_t kept) {
  rows_ = rows, runs_ = 0, pending_ = false;
  cache_.begin();
  bool back = false;
  for (size_t t = 0; t < rows; ++t) {
    const auto slot = static_cast<std::uint32_t>(slots[t]);
    work_.slot[t] = slot;
    work_.position[t] = static_cast<std::uint32_t>(cache_.append(slot));
    if (t && work_.slot[t - 1] == slot && work_.position[t] % kPageTokens) continue;
    back |= t && work_.slot[t - 1] != slot && std::any_of(work_.run.data(), work_.run.data() + runs_, [&](size_t first) {
      return work_.slot[first] == slot;
    });
    work_.run[runs_++] = t;
  }
  if (back) runs_ = 1;  // a sequence comes twice, maybe with one page: all rows are one run
  work_.run[runs_] = rows;
  embed(tokens);
  read_ = &bytes_.layers;
  bytes_.embedding += rows * model_.embedding.row_bytes(model_.hidden);
  const size_t last = model_.layers.size() - 1;
  for (size_t index = 0; index <= last; ++index) {
    bits_ = precision_ + offsets_[index];
    keys_and_queries(model_.layers[index], index);
    if (index == last) keep(kept);
    if (rows_ == 0) return;
    attention(model_.layers[index]);
    mlp(model_.layers[index]);
  }
  each_row(rows_, model_.hidden, [&](size_t t) { settle(t); });
}

// Rows whose output nobody wants end here: their keys and values are in the cache, and nothing else is left of them.
void Decoder::keep(size_t kept) {
  if (kept == rows_) return;
  const auto move = [&](float* rows, size_t width, size_t from, size_t to) {
    std::copy_n(rows + from * width, width, rows + to * width);
  };
  for (size_t i = 0; i < kept; ++i) {
    const size_t t = work_.kept[i];
    if (t == i) continue;
    move(work_.hidden.data(), model_.hidden, t, i);
    move(work_.query.data(), model_.query_width(), t, i);
    work_.queries[i] = work_.queries[t];
  }
  rows_ = kept;
}

void Decoder::embed(const std::int32_t* tokens) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  const auto embed_row = ANYBIT_ACTIVE(embedding_table).embed_row;
  const Embedding& from = model_.embedding;
  const size_t pairs = Workspace::most_pairs(model_), ropes = model_.ropes.size();
  each_row(rows_, model_.hidden, [&](size_t t) {
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

void Decoder::keys_and_queries(const Layer& layer, size_t index) {
  cache_.seal(index);
  stream_into(layer.qkv, layer.input_norm, work_.qkv.data());
  for (size_t t = 0; t < rows_; ++t) {
    const size_t position = work_.position[t];
    const size_t first = layer.window && position >= layer.window ? position + 1 - layer.window : 0;
    work_.queries[t] = {cache_.pages(index, work_.slot[t]), first, position};
  }
  auto body = [&](size_t begin, size_t end) noexcept {
    for (size_t i = begin; i < end; ++i)
      for (size_t run = i / model_.kv_heads, t = work_.run[run]; t < work_.run[run + 1]; ++t) place_head(layer, t, i % model_.kv_heads);
  };
  const size_t work = runs_ * model_.kv_heads;
  parallel_for(work, rows_ * model_.qkv_width() < kRowWork ? work : 1, body);
}

// A key-value head of one row, with its queries. Rows of a page stay with one thread: at 4 bits they share bytes.
void Decoder::place_head(const Layer& layer, size_t t, size_t kv_head) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  const auto norm_head = ANYBIT_ACTIVE(quantize_activations_table).rms_norm;
  const KvShape& shape = cache_.shape();
  const Rope& rope = model_.ropes[layer.rope];
  const size_t dim = model_.head_dim, at = (t * model_.ropes.size() + layer.rope) * Workspace::most_pairs(model_);
  const auto turn = [&](float* x, const float* weight, float* out) {
    if (weight) norm_head(x, {weight, false, model_.epsilon}, x, dim);
    math.rotate(x, work_.cosine.data() + at, work_.sine.data() + at, rope.pairs, dim, out);
    if (model_.rotated_keys) math.hadamard(out, dim);
  };
  float* row = work_.qkv.data() + t * model_.qkv_width();
  for (size_t head = kv_head * shape.group(); head < (kv_head + 1) * shape.group(); ++head)
    turn(row + head * dim, layer.query_norm, work_.query.data() + t * model_.query_width() + head * dim);
  float *key = row + model_.query_width() + kv_head * dim, *value = key + model_.kv_width();
  turn(key, layer.key_norm, key);
  const Query& query = work_.queries[t];
  std::uint8_t* page = query.pages[query.last / kPageTokens];
  ANYBIT_ACTIVE(attention_table).write_head(shape_of(shape, page), head_of(shape, page, kv_head), query.last % kPageTokens, key, value);
}

void Decoder::attention(const Layer& layer) {
  const Scoring scoring = {model_.attention_scale, model_.attention_softcap, halves_};
  attend(cache_.shape(), scoring, work_.query.data(), work_.queries.data(), rows_, work_.mixed.data());
  linear(layer.output, rows_, halves_, work_.added.data(), work_.mixed.data(), model_.query_width(), [](size_t) {});
  pending_ = true, added_norm_ = layer.attention_out_norm;
}

void Decoder::mlp(const Layer& layer) {
  stream_into(layer.gate_up, layer.mlp_norm, work_.gate_up.data());
  const QuantizeActivationsTable& k = ANYBIT_ACTIVE(quantize_activations_table);
  const size_t stride = 2 * model_.intermediate;
  const Gate gate = model_.gelu ? Gate::gelu_tanh : Gate::silu;
  linear(layer.down, rows_, halves_, work_.added.data(), work_.gate_up.data(), stride, [&](size_t t) {
    float* row = work_.gate_up.data() + t * stride;  // the product takes the place of the gate
    k.gate(row, gate, row, model_.intermediate);
  });
  pending_ = true, added_norm_ = layer.mlp_out_norm;
}

void Decoder::stream_into(const Linear& to, const float* weight, float* y) {
  const auto norm = ANYBIT_ACTIVE(quantize_activations_table).rms_norm;
  const size_t width = model_.hidden;
  linear(to, rows_, halves_, y, work_.added.data(), width, [&](size_t t) {
    settle(t);  // then what was added is not needed any more
    norm(work_.hidden.data() + t * width, {weight, false, model_.epsilon}, work_.added.data() + t * width, width);
  });
  pending_ = false;
}

void Decoder::settle(size_t t) {
  if (!pending_) return;
  const size_t width = model_.hidden;
  float* added = work_.added.data() + t * width;
  if (added_norm_) ANYBIT_ACTIVE(quantize_activations_table).rms_norm(added, {added_norm_, false, model_.epsilon}, added, width);
  ANYBIT_ACTIVE(decoder_math).add(work_.hidden.data() + t * width, added, width);
}

}  // namespace anybit
