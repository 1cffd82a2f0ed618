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

// One block's scratch: rows of queries (times scaling), scores, and what a row's softmax carries from page to page.
struct Rows {
  const KvShape& shape;
  const Block& block;
  size_t group, count;
  Carry carry;
  float *q, *scores, *gain, *floats;

  Rows(const KvShape& s, const Block& b, Scratch scratch)
      : shape(s), block(b), group(s.group()), count(b.count * group), carry(scratch, count), q(scratch.take(count * s.head_dim)),
        scores(scratch.take(count * kPageTokens)), gain(scratch.take(count * 16)), floats(scratch.take(s.head_dim * kPageTokens)) {}
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

void soften_rows(const Rows& rows, size_t page, float softcap, float* states) {
  for (size_t r = 0; r < rows.count; ++r) {
    const Slots own = visible(rows.block.queries[r / rows.group], page);
    float& peak = states[r * state_floats(rows.shape)];
    rows.gain[r] = soften<FloatWeights>(rows.carry, r, own, softcap, rows.scores + r * kPageTokens, peak);
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
  const Slots seen = visible_to_any(rows.block, 0, rows.block.count, page);
  if (seen.empty()) return;
  const KvShape& shape = rows.shape;
  const size_t dim = shape.head_dim, stride = state_floats(shape);
  const std::uint8_t* keys = rows.block.queries[0].pages[page] + rows.block.kv_head * shape.head_bytes();
  const std::uint8_t* values = keys + shape.code_bytes();
  const std::ptrdiff_t ahead = rows.block.queries[0].pages[next] - rows.block.queries[0].pages[page];
  load_scales(shape, values + shape.code_bytes(), seen, rows.carry.scales);
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
#if defined(ANYBIT_TARGET_amx)
  if (scoring.prompt) return attend_split_in_tiles(shape, scoring, block, split, states, scratch);
#endif
  Rows rows(shape, block, {scratch});
  const size_t stride = state_floats(shape);
  load_queries(rows, scoring.scaling);
  std::memset(states, 0, rows.count * stride * sizeof(float));
  for (size_t r = 0; r < rows.count; ++r) states[r * stride] = kNothing;
  const auto page_of = shape.bits == 16 ? attend_page<Half> : shape.bits == 8 ? attend_page<Byte> : attend_page<Nibble>;
  const Pages pages(block, split);
  for (size_t page = pages.begin; page < pages.end; ++page)
    page_of(rows, scoring, page, page + 1 < pages.end ? page + 1 : page, states);
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
extern const AttentionTable attention_table = {write_head, attend_split, merge, finish, kPromptRows};

}  // namespace anybit::ANYBIT_TARGET
