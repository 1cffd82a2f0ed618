// One tiny decoder under sanitizers: a prompt at once, in pieces and token by token give the same logits, on every cache width.
#include <cmath>
#include <vector>

#include "decoder/decoder.h"
#include "thread_pool.h"
#include "tiles.h"

using namespace anybit;

namespace {

constexpr size_t kHidden = 48, kHeads = 3, kKvHeads = 1, kHeadDim = 16, kInner = 33, kVocabulary = 37, kTokens = 70;

struct Tiny {
  Tiles qkv{4, (kHeads + 2 * kKvHeads) * kHeadDim, kHidden, 32, 8}, output{3, kHidden, kHeads * kHeadDim, 32, 16};
  Tiles gate_up{2, 2 * kInner, kHidden, 32, 0}, down{8, kHidden, kInner, 32, 16}, head{8, kVocabulary, kHidden, 32, 0};
  Exact<float> norm{kHidden, 1.0f}, inverse{kHeadDim / 2, 0.1f}, table{kVocabulary * kHidden};
  Exact<std::int32_t> precision{1, 8};

  static Linear linear(const Tiles& tiles) { return {{{tiles.view(), 0}}, nullptr, tiles.rows, tiles.columns}; }

  Model model() {
    std::mt19937 random(1);
    fill(table, random, -5, 5);
    Model m;
    m.hidden = kHidden, m.heads = kHeads, m.kv_heads = kKvHeads, m.head_dim = kHeadDim, m.intermediate = kInner;
    m.vocabulary = kVocabulary, m.epsilon = 1e-5f, m.attention_scale = 0.01f, m.precision = precision.data();
    m.embedding.kind = Embedding::Kind::float32, m.embedding.rows = table.data();
    m.ropes = {{inverse.data(), kHeadDim / 2, 1.0f}};
    m.final_norm = norm.data(), m.head = linear(head);
    Layer layer;
    layer.input_norm = layer.mlp_norm = norm.data();
    layer.qkv = linear(qkv), layer.output = linear(output), layer.gate_up = linear(gate_up), layer.down = linear(down);
    m.layers = {layer, layer};
    m.layers[1].window = 9;
    return m;
  }
};

// Logits [kTokens, kVocabulary] of one prompt fed `piece` tokens at a time.
void feed(Decoder& decoder, size_t piece, Exact<float>& out) {
  for (size_t begin = 0; begin < kTokens; begin += piece) {
    const size_t rows = std::min(piece, kTokens - begin);
    Exact<std::int32_t> tokens(rows), slots(rows, 1), wanted(rows);
    for (size_t i = 0; i < rows; ++i)
      tokens[i] = static_cast<std::int32_t>((begin + i) * 7 % kVocabulary), wanted[i] = static_cast<std::int32_t>(i);
    decoder.logits({tokens.data(), slots.data(), rows, wanted.data(), rows}, out.data() + begin * kVocabulary);
  }
  decoder.cache().truncate(1, 0);
}

void check(size_t kv_bits) {
  Tiny tiny;
  Decoder decoder(tiny.model(), {kHeads, kKvHeads, kHeadDim, kv_bits}, 2 * kTokens, 2, 32);
  Exact<float> whole(kTokens * kVocabulary), other(kTokens * kVocabulary);
  feed(decoder, kTokens, whole);
  for (size_t piece : {1, 7}) {
    feed(decoder, piece, other);
    for (size_t i = 0; i < whole.size(); ++i) expect(whole[i] == other[i], "logits in pieces", i, piece, kv_bits);
  }
  for (float v : whole) expect(std::isfinite(v), "finite logits", kv_bits);
  Exact<std::int32_t> token(1), slot(1), wanted(1), ids(5);
  Exact<float> values(5), logits(kVocabulary);
  decoder.top({token.data(), slot.data(), 1, wanted.data(), 1}, 5, values.data(), ids.data());
  decoder.cache().truncate(0, 0);
  decoder.logits({token.data(), slot.data(), 1, wanted.data(), 1}, logits.data());
  std::vector<float> sorted(logits.begin(), logits.end());
  std::sort(sorted.rbegin(), sorted.rend());
  for (size_t i = 0; i < 5; ++i)
    expect(values[i] == sorted[i] && logits[static_cast<size_t>(ids[i])] == values[i], "likeliest tokens", i, kv_bits);
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    for (size_t kv_bits : {16, 8, 4}) check(kv_bits);
    std::printf("decoder on %s ok\n", isa.c_str());
  }
}
