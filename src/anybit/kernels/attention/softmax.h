// One row's softmax, a page at a time: scores of 64 slots to weights, and what is carried from page to page.
#pragma once

#include "cpu.h"
#include "vectors.h"

namespace anybit::ANYBIT_TARGET {
namespace {

constexpr float kNothing = -__builtin_inff();

ANYBIT_INLINE size_t least(size_t a, size_t b) { return a < b ? a : b; }
ANYBIT_INLINE size_t most(size_t a, size_t b) { return a > b ? a : b; }

struct Slots {
  size_t begin, end;  // of one page
  bool empty() const { return begin >= end; }
};

// The slots of page `page` that a query sees.
ANYBIT_INLINE Slots visible(const Query& query, size_t page) {
  const size_t start = page * kPageTokens, stop = start + kPageTokens;
  if (query.last < start || query.first >= stop) return {0, 0};
  return {most(query.first, start) - start, least(query.last + 1, stop) - start};
}

// The union of what the block's queries [begin, end) see of a page.
ANYBIT_INLINE Slots visible_to_any(const Block& block, size_t begin, size_t end, size_t page) {
  Slots seen = {kPageTokens, 0};
  for (size_t i = begin; i < end; ++i) {
    const Slots own = visible(block.queries[i], page);
    if (!own.empty()) seen = {least(seen.begin, own.begin), most(seen.end, own.end)};
  }
  return seen;
}

// The pages of a split that the block's queries see.
struct Pages {
  size_t begin, end;

  Pages(const Block& block, size_t split) {
    size_t first = block.queries[0].first, last = block.queries[0].last;
    for (size_t i = 1; i < block.count; ++i) first = least(first, block.queries[i].first), last = most(last, block.queries[i].last);
    begin = most(first / kPageTokens, split * kSplitPages);
    end = least(last / kPageTokens + 1, (split + 1) * kSplitPages);
  }
};

// Hands out scratch.
struct Scratch {
  float* at;
  float* take(size_t floats) { return (at += floats) - floats; }
};

// What softmax needs beside scores: a row's sum of its query (or what else stands before the key minimum), its sums of weights and of weighted minima (16 lanes each), and the
// page's scales.
struct Carry {
  float *sums, *lanes, *minima, *scales;

  Carry(Scratch& scratch, size_t rows)
      : sums(scratch.take(rows * 16)), lanes(scratch.take(rows * 16)), minima(scratch.take(rows * 16)),
        scales(scratch.take(4 * kPageTokens)) {
    std::memset(lanes, 0, rows * 16 * sizeof(float));
    std::memset(minima, 0, rows * 16 * sizeof(float));
  }

  // Largest score, sum of weights and weighted values of row r, done with its pages.
  template <class Weights>
  ANYBIT_INLINE void leave(size_t r, float peak, const float* values, size_t dim, float* state) const {
    state[0] = peak;
    state[1] = Weights::sum(load(lanes + r * 16));
    const float minimum = Weights::sum(load(minima + r * 16));
    for (size_t d = 0; d < dim; d += kVec) save(state + kStateHead + d, load(values + d) + minimum);
  }
};

// One kv head's block of a page.
struct Stored {
  KvShape shape;
  const std::uint8_t *keys, *values;
  const std::uint16_t *key_ranges, *value_ranges;  // scales, then minima

  Stored(const KvShape& any, const std::uint8_t* page, size_t kv_head)
      : shape(shape_of(any, page)), keys(head_of(any, page, kv_head)), values(keys + shape.key_bytes()),
        key_ranges(reinterpret_cast<const std::uint16_t*>(values + shape.value_bytes())),
        value_ranges(key_ranges + shape.key_range_bytes() / 2) {}
};

// Scales and minima of slots, [2][64]: zero outside `seen`, as what lies in unused slots may be NaN; 1 and 0 without any.
void load_slot_ranges(const std::uint16_t* stored, size_t bits, Slots seen, float* ranges) {
  for (size_t t = 0; t < 2 * kPageTokens; t += kVec) save(ranges + t, all(bits == 16 && t < kPageTokens ? 1.0f : 0.0f));
  if (bits == 16) return;
  for (size_t i = 0; i < 2; ++i, ranges += kPageTokens, stored += kPageTokens) {
    halves(stored, ranges, kPageTokens);
    for (size_t t = 0; t < seen.begin; ++t) ranges[t] = 0.0f;
    for (size_t t = seen.end; t < kPageTokens; ++t) ranges[t] = 0.0f;
  }
}

// Key scale, key minimum, value scale, value minimum [4][64]. Ranges per channel have gone into the queries: then a score is
// 1 * score + 1 * the row's sum.
void load_scales(const Stored& page, Slots seen, float* scales) {
  if (page.shape.channels) {
    for (size_t t = 0; t < 2 * kPageTokens; t += kVec) save(scales + t, all(1.0f));
  } else {
    load_slot_ranges(page.key_ranges, page.shape.key_bits, seen, scales);
  }
  load_slot_ranges(page.value_ranges, page.shape.value_bits, seen, scales + 2 * kPageTokens);
}

ANYBIT_INLINE Vec cap(Vec x, float softcap) {
  const Vec doubled = x * (2.0f / softcap);
  const Vec e = exponential(doubled < all(80.0f) ? doubled : all(80.0f));
  return softcap - (2.0f * softcap) / (e + 1.0f);
}

// How weights are made and kept: as floats in place of the scores; tiles_amx.h has another way.
struct FloatWeights {
  static constexpr float kSlack = 0.0f;
  ANYBIT_INLINE static Vec power(Vec x, float peak) { return exponential(x - peak); }
  ANYBIT_INLINE static float sum(Vec x) { return total(x); }
  ANYBIT_INLINE static void put(float* scores, size_t t, Vec weight) { save(scores + t, weight); }
};

// Row r's scores on a page to weights times value scales; its running maximum and sums. Returns by how much earlier pages shrink.
template <class Weights, bool kWhole>
ANYBIT_INLINE float soften_slots(const Carry& carry, size_t r, Slots seen, float softcap, float* scores, float& peak) {
  constexpr size_t kVecs = kPageTokens / kVec;
  const float *s = carry.scales, *m = s + kPageTokens, *value_s = m + kPageTokens, *value_m = value_s + kPageTokens;
  Ints slot;
  for (size_t i = 0; i < kVec; ++i) slot[i] = static_cast<int>(i);
  Vec x[kVecs], top = all(peak);
#pragma GCC unroll 16
  for (size_t v = 0; v < kVecs; ++v, slot += static_cast<int>(kVec)) {
    x[v] = fused(load(s + v * kVec), load(scores + v * kVec), load(m + v * kVec) * carry.sums[r]);
    if (softcap > 0.0f) x[v] = cap(x[v], softcap);
    if (!kWhole) x[v] = (slot >= static_cast<int>(seen.begin)) & (slot < static_cast<int>(seen.end)) ? x[v] : all(kNothing);
    top = larger(x[v], top);
  }
  const float before = peak, highest = largest(top);
  Vec sum = load(carry.lanes + r * 16), minimum = load(carry.minima + r * 16), gain = all(1.0f);
  if (highest > before + Weights::kSlack) {
    peak = highest;
    gain = exponential(all(before - peak));
    sum *= gain, minimum *= gain;
  }
#pragma GCC unroll 16
  for (size_t v = 0; v < kVecs; ++v) {
    const Vec p = Weights::power(x[v], peak);
    sum += p;
    minimum = fused(p, load(value_m + v * kVec), minimum);
    Weights::put(scores, v * kVec, p * load(value_s + v * kVec));
  }
  save(carry.lanes + r * 16, sum);
  save(carry.minima + r * 16, minimum);
  return gain[0];
}

template <class Weights>
ANYBIT_INLINE float soften(const Carry& carry, size_t r, Slots seen, float softcap, float* scores, float& peak) {
  if (seen.end - seen.begin == kPageTokens) return soften_slots<Weights, true>(carry, r, seen, softcap, scores, peak);
  if (!seen.empty()) return soften_slots<Weights, false>(carry, r, seen, softcap, scores, peak);
  std::memset(scores, 0, kPageTokens * sizeof(float));
  return 1.0f;
}

}  // namespace
}  // namespace anybit::ANYBIT_TARGET
