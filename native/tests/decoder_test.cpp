// One tiny decoder under sanitizers: a prompt at once, in pieces and token by token give the same logits, on every cache width.
#include <algorithm>
#include <cmath>
#include <stdexcept>
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

void check(size_t kv_bits, bool sealed) {
  Tiny tiny;
  Decoder decoder(tiny.model(), {kHeads, kKvHeads, kHeadDim, kv_bits, kv_bits, sealed}, {sealed}, 2 * kTokens, 2, 32);
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

// Inputs quantized by schemes with offsets and columns in float, rotated first: prompts in pieces still give the same bits.
void check_schemes(size_t kv_bits) {
  Tiny tiny;
  Model model = tiny.model();
  Exact<std::uint32_t> bypass(2);
  bypass[1] = kHidden - 1;
  const size_t blocks = 2 * kInner / 16 + 1;
  Exact<float> sums(blocks * 16, 0.01f);
  Exact<std::uint16_t> columns(blocks * 2 * 16, 0x1000);
  Scheme scheme;
  scheme.bits = 4, scheme.symmetric = false, scheme.group_size = kHidden, scheme.bypass = bypass.data(), scheme.bypassed = 2;
  for (Layer& layer : model.layers) {
    Linear& to = layer.gate_up;
    to.schemes = {scheme}, to.parts[0].scheme = 0;
    to.parts[0].side = {sums.data(), columns.data(), 1, 2, 2 * kInner};
    to.rotation = {nullptr, 1, 16};
    layer.down.schemes = {Scheme{}}, layer.down.schemes[0].group_size = kInner, layer.down.parts[0].scheme = 0;
  }
  Decoder decoder(model, {kHeads, kKvHeads, kHeadDim, kv_bits, kv_bits, false}, {false}, 2 * kTokens, 2, 32);
  Exact<float> whole(kTokens * kVocabulary), other(kTokens * kVocabulary);
  feed(decoder, kTokens, whole);
  for (size_t piece : {1, 7}) {
    feed(decoder, piece, other);
    for (size_t i = 0; i < whole.size(); ++i) expect(whole[i] == other[i], "quantized inputs in pieces", i, piece, kv_bits);
  }
  for (float v : whole) expect(std::isfinite(v), "finite logits", kv_bits);
}

// A nested weight read at three bits, by the cell or by an offset, is the weight of those three planes, and costs as much.
void check_precision(size_t kv_bits) {
  Tiny tiny, three;
  Model nested = tiny.model(), alone = three.model();
  for (size_t i = 0; i < nested.layers.size(); ++i) {
    TiledWeight view = tiny.qkv.view();
    view.bits = 3, view.scale_mul = 2.0f, view.zero_mul = 0.5f, view.zero_add = -0.25f;
    nested.layers[i].qkv.parts[0].views[2] = view;
    view.planes = three.qkv.lines.data(), view.scale = three.qkv.scales.data(), view.zero = three.qkv.zeros.data();
    alone.layers[i].qkv.parts[0] = {view, 0};
  }
  const KvShape shape{kHeads, kKvHeads, kHeadDim, kv_bits, kv_bits};
  Decoder switched(nested, shape, {}, 2 * kTokens, 2, 32), fixed(alone, shape, {}, 2 * kTokens, 2, 32);
  Exact<float> wanted(kTokens * kVocabulary), found(kTokens * kVocabulary);
  Exact<std::int32_t> down(2, -1), none(2, 0);
  const auto same = [&] { return std::equal(found.begin(), found.end(), wanted.begin()); };
  feed(fixed, kTokens, wanted);
  const size_t bytes = fixed.weight_bytes().layers;
  feed(switched, kTokens, found);
  expect(!same() && switched.weight_bytes().layers > bytes, "all planes", kv_bits);
  tiny.precision[0] = 3;
  feed(switched, kTokens, found);
  expect(same() && switched.weight_bytes().layers == bytes, "three planes by the cell", kv_bits);
  tiny.precision[0] = 4, switched.set_offsets(down.data());
  feed(switched, kTokens, found);
  expect(same(), "three planes by offsets", kv_bits);
  tiny.precision[0] = 99, switched.set_offsets(none.data());
  feed(switched, 7, found);
  expect(!same(), "beyond what is stored: all of it", kv_bits);
  Exact<std::int32_t> token(70, 5), slot(70, 0);
  fixed.logits({token.data(), slot.data(), 70, token.data(), 0}, nullptr);
  Exact<float> keys(kKvHeads * 70 * kHeadDim), values(kKvHeads * 70 * kHeadDim);
  fixed.cache().read(1, 0, keys.data(), values.data());
  for (float v : values) expect(std::isfinite(v), "values of the last layer", kv_bits);
}

template <class Call>
void refuses(Call&& call, const char* what) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  expect(false, what);
}

// Tokens [begin, begin + rows) of a text in a slot, and their logits [rows, kVocabulary].
std::vector<float> append(Decoder& decoder, size_t slot, size_t begin, size_t rows) {
  Exact<std::int32_t> tokens(rows), slots(rows, static_cast<std::int32_t>(slot)), wanted(rows);
  for (size_t i = 0; i < rows; ++i)
    tokens[i] = static_cast<std::int32_t>((begin + i) * 11 % kVocabulary), wanted[i] = static_cast<std::int32_t>(i);
  std::vector<float> out(rows * kVocabulary);
  decoder.logits({tokens.data(), slots.data(), rows, wanted.data(), rows}, out.data());
  return out;
}

// Two pages of one slot begin another: same logits, nothing writes them, and each is free when the last reference is gone.
void check_sharing(size_t kv_bits, bool sealed) {
  constexpr size_t shared = 2 * kPageTokens, rest = 21;
  Tiny tiny;
  Decoder decoder(tiny.model(), {kHeads, kKvHeads, kHeadDim, kv_bits, kv_bits, sealed}, {sealed}, 600, 3, 32);
  KvCache& cache = decoder.cache();
  const size_t all = cache.free_pages();
  expect(all == cache.pool_pages(), "every page is free", kv_bits);
  append(decoder, 0, 0, shared);
  refuses([&] { cache.hold(0, 2); }, "a page that is not there");
  if (sealed) refuses([&] { cache.hold(0, 1); }, "a page that is still open");
  const std::vector<float> wanted = append(decoder, 0, shared, rest);
  refuses([&] { cache.hold(0, 2); }, "a page that is not full");
  std::vector<std::uint32_t> pages;
  for (size_t index : {0, 1}) pages.push_back(static_cast<std::uint32_t>(cache.hold(0, index)));
  std::vector<const std::uint8_t*> at;
  std::vector<std::uint8_t> before;
  for (size_t layer : {0, 1})
    for (size_t index : {0, 1}) at.push_back(cache.pages(layer, 0)[index]);
  const size_t bytes = cache.shape().page_bytes();
  for (const std::uint8_t* page : at) before.insert(before.end(), page, page + bytes);
  refuses([&] { cache.truncate(0, shared - 3); }, "to write a page that is held");
  cache.truncate(0, 0);
  expect(cache.free_pages() == all - 2, "held pages outlive their slot", kv_bits);
  for (size_t slot : {1, 2}) cache.attach(slot, pages.data(), 2);
  refuses([&] { cache.attach(1, pages.data(), 1); }, "to begin a slot twice");
  for (size_t slot : {1, 2}) {
    expect(cache.length(slot) == shared && append(decoder, slot, shared, rest) == wanted, "logits over shared pages", slot, kv_bits);
    cache.truncate(slot, shared + 5);
    refuses([&] { cache.truncate(slot, shared - 3); }, "to write a page that others read");
  }
  append(decoder, 1, 5, 80);
  for (size_t i = 0; i < at.size(); ++i)
    expect(std::equal(at[i], at[i] + bytes, before.data() + i * bytes), "nothing writes a shared page", i, kv_bits);
  cache.truncate(1, kPageTokens);
  for (std::uint32_t page : pages) cache.release(page);
  refuses([&] { cache.release(pages[0]); }, "to release twice");
  expect(cache.references()[pages[0]] == 2 && cache.references()[pages[1]] == 1, "slots still refer to them", kv_bits);
  refuses([&] { cache.truncate(2, shared - 3); }, "to write a page that another slot wrote");
  for (size_t slot : {1, 2}) cache.truncate(slot, 0);
  expect(cache.free_pages() == all, "everything is free again", kv_bits);
  refuses([&] { cache.attach(0, pages.data(), 1); }, "pages that nobody holds");
  refuses([&] { cache.release(1000); }, "a page beyond the pool");
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    for (size_t kv_bits : {16, 8, 4, 2}) check(kv_bits, false), check_precision(kv_bits), check_schemes(kv_bits);
    for (size_t kv_bits : {16, 8, 4, 2}) check_sharing(kv_bits, false);
    for (size_t kv_bits : {8, 4, 2}) check(kv_bits, true), check_sharing(kv_bits, true);
    std::printf("decoder on %s ok\n", isa.c_str());
  }
}
