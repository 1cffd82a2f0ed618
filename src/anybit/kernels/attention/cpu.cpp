// Attention of one block of rows over one split of pages; cpu.h has the layout, NOTES.md the numbers.
//
// A page costs two products with codes: scores = queries x keys, then values += weights x values. Scales never touch the codes:
//   score_t = s_t (q . code_t) + m_t sum(q)        sum_t p_t x_t = sum_t (p_t s_t) code_t + sum_t p_t m_t
#include "cpu.h"

#include "product.h"
#include "softmax.h"
#include "store.h"
#if defined(ANYBIT_TARGET_amx)
#include "tiles_amx.h"
#endif

namespace anybit::ANYBIT_TARGET {
namespace {

// One block's scratch: rows of queries (times scaling), scores, and what a row's softmax carries from page to page. `folded` and
// `bases`: queries times the key scales of a page's channels, and the sums of their products with the minima.
struct Rows {
  const KvShape& shape;
  const Block& block;
  size_t group, count;
  Carry carry;
  float *q, *scores, *gain, *floats, *folded, *bases;

  Rows(const KvShape& s, const Block& b, Scratch scratch)
      : shape(s), block(b), group(s.group()), count(b.count * group), carry(scratch, count), q(scratch.take(count * s.head_dim)),
        scores(scratch.take(count * kPageTokens)), gain(scratch.take(count * 16)), floats(scratch.take(s.head_dim * kPageTokens)),
        folded(scratch.take(count * s.head_dim)), bases(scratch.take(count * 16)) {}
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
    rows.carry.sums[r] = total(sum);
  }
}

void soften_rows(const Rows& rows, const Carry& carry, size_t page, float softcap, float* states) {
  for (size_t r = 0; r < rows.count; ++r) {
    const Slots own = visible(rows.block.queries[r / rows.group], page);
    float& peak = states[r * state_floats(rows.shape)];
    rows.gain[r] = soften<FloatWeights>(carry, r, own, softcap, rows.scores + r * kPageTokens, peak);
  }
}

// score_t = sum_c (q_c s_c) code_tc + sum_c q_c m_c
void fold(const Rows& rows, const std::uint16_t* ranges) {
  const size_t dim = rows.shape.head_dim;
  float *scale = rows.floats, *minimum = scale + dim;
  halves(ranges, scale, 2 * dim);
  for (size_t r = 0; r < rows.count; ++r) {
    Vec base = {};
    for (size_t d = 0; d < dim; d += kVec) {
      const Vec q = load(rows.q + r * dim + d);
      save(rows.folded + r * dim + d, q * load(scale + d));
      base = fused(q, load(minimum + d), base);
    }
    rows.bases[r] = total(base);
  }
}

template <class Codes>
void score(const Rows& rows, const Stored& page, const float* q, Slots seen, std::ptrdiff_t ahead) {
  const size_t dim = rows.shape.head_dim, stored = dim / Codes::kRows;
  const Product product = {q, dim, page.keys, kPageTokens, stored, 0, stored, nullptr, rows.scores, kPageTokens, ahead};
  multiply_codes<Codes>(product, rows.count, (seen.end + 15) / 16 * 16, rows.floats);
}

// Stored rows of values that hold slots of `seen`, where row t has slots t, t + step, ... Slots that come along unused have weight
// 0 and, unlike a float16, a finite code.
ANYBIT_INLINE Slots sharing(Slots seen, size_t step) {
  if (seen.begin / step == (seen.end - 1) / step) return {seen.begin % step, (seen.end - 1) % step + 1};
  return {0, step};
}

template <class Codes>
void weigh(const Rows& rows, const Stored& page, Slots seen, float* states, std::ptrdiff_t ahead) {
  constexpr size_t kStep = kPageTokens / Codes::kRows;
  const size_t dim = rows.shape.head_dim;
  const Slots stored = sharing(seen, kStep);
  const Product product = {rows.scores, kPageTokens, page.values, dim, kStep, stored.begin, stored.end, rows.gain,
                           states + kStateHead, state_floats(rows.shape), ahead};
  multiply_codes<Codes>(product, rows.count, dim, rows.floats);
}

ANYBIT_INLINE size_t by_bits(size_t bits) { return bits == 16 ? 0 : bits == 8 ? 1 : bits == 4 ? 2 : 3; }

void attend_page(const Rows& rows, const Scoring& scoring, size_t page, size_t next, float* states) {
  constexpr decltype(&score<Half>) scores[] = {score<Half>, score<Byte>, score<Nibble>, score<Crumb>};
  constexpr decltype(&weigh<Half>) weights[] = {weigh<Half>, weigh<Byte>, weigh<Nibble>, weigh<Crumb>};
  const Block& block = rows.block;
  const Slots seen = visible_to_any(block, 0, block.count, page);
  if (seen.empty()) return;
  const Stored stored(rows.shape, block.queries[0].pages[page], block.kv_head);
  const std::ptrdiff_t ahead = Stored(rows.shape, block.queries[0].pages[next], block.kv_head).keys - stored.keys;
  load_scales(stored, seen, rows.carry.scales);
  Carry carry = rows.carry;
  if (stored.shape.channels) fold(rows, stored.key_ranges), carry.sums = rows.bases;
  scores[by_bits(stored.shape.key_bits)](rows, stored, stored.shape.channels ? rows.folded : rows.q, seen, ahead);
  soften_rows(rows, carry, page, scoring.softcap, states);
  weights[by_bits(stored.shape.value_bits)](rows, stored, seen, states, ahead);
}

void attend_split(const KvShape& shape, const Scoring& scoring, const Block& block, size_t split, float* states, float* scratch) {
#if defined(ANYBIT_TARGET_amx)
  if (scoring.prompt || shape.key_bits < 8 || shape.value_bits < 8)
    return attend_split_in_tiles(shape, scoring, block, split, states, scratch);
#endif
  Rows rows(shape, block, {scratch});
  const size_t stride = state_floats(shape);
  load_queries(rows, scoring.scaling);
  std::memset(states, 0, rows.count * stride * sizeof(float));
  for (size_t r = 0; r < rows.count; ++r) states[r * stride] = kNothing;
  const Pages pages(block, split);
  for (size_t page = pages.begin; page < pages.end; ++page)
    attend_page(rows, scoring, page, page + 1 < pages.end ? page + 1 : page, states);
  for (size_t r = 0; r < rows.count; ++r) {
    float* state = states + r * stride;
    rows.carry.leave<FloatWeights>(r, state[0], state + kStateHead, shape.head_dim, state);
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

#if defined(ANYBIT_TARGET_amx)
constexpr size_t kPromptRows = 192;  // NOTES.md
#else
constexpr size_t kPromptRows = kBlockRows;
#endif
extern const AttentionTable attention_table = {write_head, seal_head, attend_split, merge, finish, kPromptRows};

}  // namespace anybit::ANYBIT_TARGET
