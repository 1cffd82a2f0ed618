// Attention of one block of rows over one split of pages; cpu.h has the layout, NOTES.md the numbers.
//
// A page costs two products with codes: scores = queries x keys, then values += weights x values. Scales never touch the codes:
//   score_t = s_t (q . code_t) + m_t sum(q)        sum_t p_t x_t = sum_t (p_t s_t) code_t + sum_t p_t m_t
#include "cpu.h"

#include "product.h"
#include "store.h"

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

// One block's scratch: rows of queries (times scaling), scores, and what a row's softmax carries from page to page.
struct Rows {
  const KvShape& shape;
  const Block& block;
  size_t group, count;
  float *q, *scores, *sums, *gain, *lanes, *minima, *scales, *floats;

  Rows(const KvShape& s, const Block& b, float* at) : shape(s), block(b), group(s.group()), count(b.count * s.group()) {
    const auto take = [&at](size_t n) { return (at += n) - n; };
    q = take(count * s.head_dim), scores = take(count * kPageTokens);
    lanes = take(count * 16), minima = take(count * 16), sums = take(count * 16), gain = take(count * 16);
    scales = take(4 * kPageTokens), floats = take(s.head_dim * kPageTokens);
  }
};

void load_queries(Rows& rows, float scaling) {
  const size_t dim = rows.shape.head_dim;
  for (size_t r = 0; r < rows.count; ++r) {
    const size_t token = r / rows.group, head = rows.block.kv_head * rows.group + r % rows.group;
    const float* q = rows.block.q + (token * rows.shape.heads + head) * dim;
    Vec sum = {};
    for (size_t d = 0; d < dim; d += kVec) {
      const Vec scaled = load(q + d) * scaling;
      save(rows.q + r * dim + d, scaled);
      sum += scaled;
    }
    rows.sums[r] = total(sum);
  }
}

// Key scale, key minimum, value scale, value minimum [4][64]; zero outside `seen`: what lies in unused slots may be NaN.
void load_scales(const KvShape& shape, const std::uint8_t* stored, Slots seen, float* scales) {
  for (size_t i = 0; i < 4; ++i) {
    float* row = scales + i * kPageTokens;
    for (size_t t = 0; t < kPageTokens; t += kVec) save(row + t, all(shape.bits == 16 && i % 2 == 0 ? 1.0f : 0.0f));
    if (shape.bits == 16) continue;
    halves(reinterpret_cast<const std::uint16_t*>(stored) + i * kPageTokens, row, kPageTokens);
    for (size_t t = 0; t < seen.begin; ++t) row[t] = 0.0f;
    for (size_t t = seen.end; t < kPageTokens; ++t) row[t] = 0.0f;
  }
}

ANYBIT_INLINE Vec cap(Vec x, float softcap) {
  const Vec doubled = x * (2.0f / softcap);
  const Vec e = exponential(doubled < all(80.0f) ? doubled : all(80.0f));
  return softcap - (2.0f * softcap) / (e + 1.0f);
}

// One row's scores on a page to weights times value scales; its running maximum, sums and gain (what earlier pages shrink by).
template <bool kWhole>
ANYBIT_INLINE void soften(const Rows& rows, size_t r, Slots seen, float softcap, float& peak) {
  constexpr size_t kVecs = kPageTokens / kVec;
  float* scores = rows.scores + r * kPageTokens;
  const float *s = rows.scales, *m = s + kPageTokens, *value_s = m + kPageTokens, *value_m = value_s + kPageTokens;
  Ints slot;
  for (size_t i = 0; i < kVec; ++i) slot[i] = static_cast<int>(i);
  Vec x[kVecs], top = all(peak);
#pragma GCC unroll 16
  for (size_t v = 0; v < kVecs; ++v, slot += static_cast<int>(kVec)) {
    x[v] = fused(load(s + v * kVec), load(scores + v * kVec), load(m + v * kVec) * rows.sums[r]);
    if (softcap > 0.0f) x[v] = cap(x[v], softcap);
    if (!kWhole) x[v] = (slot >= static_cast<int>(seen.begin)) & (slot < static_cast<int>(seen.end)) ? x[v] : all(kNothing);
    top = larger(x[v], top);
  }
  const float before = peak;
  peak = largest(top);
  const Vec gain = peak == before ? all(1.0f) : exponential(all(before - peak));
  Vec sum = load(rows.lanes + r * 16) * gain, minimum = load(rows.minima + r * 16) * gain;
#pragma GCC unroll 16
  for (size_t v = 0; v < kVecs; ++v) {
    const Vec p = exponential(x[v] - peak);
    sum += p;
    minimum = fused(p, load(value_m + v * kVec), minimum);
    save(scores + v * kVec, p * load(value_s + v * kVec));
  }
  save(rows.lanes + r * 16, sum);
  save(rows.minima + r * 16, minimum);
  rows.gain[r] = gain[0];
}

// The union of what the block's queries see of a page.
ANYBIT_INLINE Slots visible_to_any(const Block& block, size_t page) {
  Slots seen = {kPageTokens, 0};
  for (size_t i = 0; i < block.count; ++i) {
    const Slots own = visible(block.queries[i], page);
    if (!own.empty()) seen = {least(seen.begin, own.begin), most(seen.end, own.end)};
  }
  return seen;
}

void soften_rows(const Rows& rows, size_t page, float softcap, float* states) {
  for (size_t r = 0; r < rows.count; ++r) {
    const Slots own = visible(rows.block.queries[r / rows.group], page);
    float& peak = states[r * state_floats(rows.shape)];
    if (own.empty()) {
      rows.gain[r] = 1.0f;
      std::memset(rows.scores + r * kPageTokens, 0, kPageTokens * sizeof(float));
    } else if (own.end - own.begin == kPageTokens) {
      soften<true>(rows, r, own, softcap, peak);
    } else {
      soften<false>(rows, r, own, softcap, peak);
    }
  }
}

// Stored rows of 4-bit values that hold slots of `seen`: row t has slots t and t + 32. Slots that come along unused have weight 0
// and, unlike a float16, a finite code.
ANYBIT_INLINE Slots pairs(Slots seen) {
  constexpr size_t kHalf = kPageTokens / 2;
  if (seen.end <= kHalf) return seen;
  return seen.begin < kHalf ? Slots{0, kHalf} : Slots{seen.begin - kHalf, seen.end - kHalf};
}

template <class Codes>
void attend_page(const Rows& rows, const Scoring& scoring, size_t page, size_t next, float* states) {
  const Slots seen = visible_to_any(rows.block, page);
  if (seen.empty()) return;
  const KvShape& shape = rows.shape;
  const size_t dim = shape.head_dim, stride = state_floats(shape);
  const std::uint8_t* keys = rows.block.queries[0].pages[page] + rows.block.kv_head * shape.head_bytes();
  const std::uint8_t* values = keys + shape.code_bytes();
  const std::ptrdiff_t ahead = rows.block.queries[0].pages[next] - rows.block.queries[0].pages[page];
  load_scales(shape, values + shape.code_bytes(), seen, rows.scales);
  const Product score = {rows.q, dim, keys, kPageTokens, dim / 2, 0, dim / Codes::kRows, nullptr,
                         rows.scores, kPageTokens, ahead};
  multiply_codes<Codes>(score, rows.count, (seen.end + 15) / 16 * 16, rows.floats);
  soften_rows(rows, page, scoring.softcap, states);
  const Slots stored = Codes::kRows == 2 ? pairs(seen) : seen;
  const Product weigh = {rows.scores, kPageTokens, values, dim, kPageTokens / 2, stored.begin, stored.end, rows.gain,
                         states + kStateHead, stride, ahead};
  multiply_codes<Codes>(weigh, rows.count, dim, rows.floats);
}

void attend_split(const KvShape& shape, const Scoring& scoring, const Block& block, size_t split, float* states, float* scratch) {
  Rows rows(shape, block, scratch);
  const size_t stride = state_floats(shape);
  load_queries(rows, scoring.scaling);
  std::memset(states, 0, rows.count * stride * sizeof(float));
  std::memset(rows.lanes, 0, 2 * rows.count * 16 * sizeof(float));
  for (size_t r = 0; r < rows.count; ++r) states[r * stride] = kNothing;
  size_t first = block.queries[0].first, last = block.queries[0].last;
  for (size_t i = 1; i < block.count; ++i) first = least(first, block.queries[i].first), last = most(last, block.queries[i].last);
  const size_t begin = most(first / kPageTokens, split * kSplitPages);
  const size_t end = least(last / kPageTokens + 1, (split + 1) * kSplitPages);
  const auto page_of = shape.bits == 16 ? attend_page<Half> : shape.bits == 8 ? attend_page<Byte> : attend_page<Nibble>;
  for (size_t page = begin; page < end; ++page) page_of(rows, scoring, page, page + 1 < end ? page + 1 : page, states);
  for (size_t r = 0; r < rows.count; ++r) {
    float* state = states + r * stride;
    state[1] = total(load(rows.lanes + r * 16));
    const float minimum = total(load(rows.minima + r * 16));
    for (size_t d = kStateHead; d < stride; d += kVec) save(state + d, load(state + d) + minimum);
  }
}

void merge(const KvShape& shape, size_t rows, const float* later, float* states) {
  const size_t stride = state_floats(shape);
  for (size_t r = 0; r < rows; ++r, later += stride, states += stride) {
    if (later[0] == kNothing) continue;
    if (states[0] == kNothing) {
      std::memcpy(states, later, stride * sizeof(float));
      continue;
    }
    const float peak = later[0] > states[0] ? later[0] : states[0];
    const Vec mine = exponential(all(states[0] - peak)), theirs = exponential(all(later[0] - peak));
    states[0] = peak;
    states[1] = states[1] * mine[0] + later[1] * theirs[0];
    for (size_t d = kStateHead; d < stride; d += kVec)
      save(states + d, fused(load(later + d), theirs, load(states + d) * mine));
  }
}

void finish(const KvShape& shape, const Block& block, const float* states, float* out) {
  const size_t group = shape.group(), dim = shape.head_dim, stride = state_floats(shape);
  for (size_t r = 0; r < block.count * group; ++r, states += stride) {
    float* y = out + (r / group * shape.heads + block.kv_head * group + r % group) * dim;
    for (size_t d = 0; d < dim; d += kVec) save(y + d, load(states + kStateHead + d) / states[1] + 0.0f);  // never -0
  }
}

}  // namespace

extern const AttentionTable attention_table = {write_head, attend_split, merge, finish};

}  // namespace anybit::ANYBIT_TARGET
