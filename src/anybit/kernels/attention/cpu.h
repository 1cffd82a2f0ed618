// Causal attention over a paged, quantized key-value cache; op.py has the contract, the layout is here.
//
// A page holds kPageTokens tokens of one layer, one block of head_bytes() per kv head:
//   keys    [head_dim][64 tokens]  dim-major: tokens are vector lanes, scores need no horizontal sums
//   values  [64 tokens][head_dim]
//   ranges  float16: key scale s and minimum m, [2][64], or [2][head_dim] with `channels`; then value scale and minimum [2][64];
//           each absent at 16 bits
// 16 bits: float16, saturated at +-65504. Fewer: x ~ m + s * code, one range per token and head (QServe), or for keys per channel
// over the page's 64 tokens (KIVI). m is the minimum rounded down to float16 and s = (max - m) / (2^bits - 1) rounded up; codes are
// found with the rounded two, so |x - x~| <= s / 2 holds for what is stored. (A float16 zero -min / s would lose that as soon as
// |min| >> max - min.) b <= 4 bits: rows r, r + rows b / 8, ... share bytes, the first in the lowest bits: one widened byte vector
// gives 8 / b rows.
// A page is sealed, as above, or open: 16 bits whatever the shape says. Whoever owns the pages decides, and says so in bit 0 of
// their address. Ranges per channel need the whole page, so such pages are written open and sealed when they are full.
#pragma once

#include "targets.h"

namespace anybit {

constexpr size_t kPageTokens = 64;
// A softmax runs over this many pages, then starts afresh and is merged: cuts lie at absolute positions, so that neither threads
// nor the tokens computed together change a bit.
constexpr size_t kSplitPages = 16;

struct KvShape {
  size_t heads, kv_heads, head_dim;  // heads a multiple of kv_heads, head_dim of 16
  size_t key_bits, value_bits;       // 16 (float16), 8, 4 or 2
  bool channels = false;             // keys have ranges per channel

  size_t group() const { return heads / kv_heads; }                                // query heads of one kv head
  size_t key_bytes() const { return head_dim * kPageTokens * key_bits / 8; }       // codes of one kv head
  size_t value_bytes() const { return head_dim * kPageTokens * value_bits / 8; }
  size_t key_range_bytes() const { return key_bits == 16 ? 0 : 4 * (channels ? head_dim : kPageTokens); }
  size_t value_range_bytes() const { return value_bits == 16 ? 0 : 4 * kPageTokens; }
  size_t head_bytes() const { return key_bytes() + value_bytes() + key_range_bytes() + value_range_bytes(); }
  size_t page_bytes() const { return kv_heads * head_bytes(); }  // a multiple of 64
  KvShape open() const { return {heads, kv_heads, head_dim, 16, 16}; }
};

// A page as a table names it, and one kv head's block of it.
ANYBIT_INLINE bool is_open(const std::uint8_t* page) { return reinterpret_cast<std::uintptr_t>(page) & 1; }
ANYBIT_INLINE KvShape shape_of(const KvShape& shape, const std::uint8_t* page) { return is_open(page) ? shape.open() : shape; }
template <class Pointer>
ANYBIT_INLINE Pointer head_of(const KvShape& shape, Pointer page, size_t kv_head) {
  return page - is_open(page) + kv_head * shape_of(shape, page).head_bytes();
}

// Where one query token looks: the pages of its sequence in this layer, and the positions it may see, [first, last].
struct Query {
  std::uint8_t* const* pages;  // page p (bit 0 set: it is open) holds positions [64 p, 64 p + 64); only pages that hold visible positions are read
  size_t first, last;          // last is the token's own position; its key and value are already written
};

// `scaling` multiplies scores; `softcap` > 0 bounds them by softcap * tanh(score / softcap) (Gemma-2).
// `prompt`: with a matrix unit, products are in bfloat16 (queries, weights and what is held in 16 bits are rounded to it, codes
// are exact) and sums in float32; without one it changes nothing. Caches with codes of 4 or 2 bits are always read like that.
struct Scoring {
  float scaling, softcap;
  bool prompt;
};

// Writes key and value [kv_heads, head_dim] of position `position` into its page, which is open if keys have ranges per channel.
void kv_write(const KvShape& shape, std::uint8_t* page, size_t position, const float* key, const float* value);

// The same for many tokens, on all threads: token t goes to position queries[t].last; no two to the same slot.
void kv_write(const KvShape& shape, const Query* queries, size_t tokens, const float* keys, const float* values);

// Codes and ranges of a full open page (bit 0 not set here) into `sealed`.
void kv_seal(const KvShape& shape, const std::uint8_t* open, std::uint8_t* sealed);

// out [tokens, heads, head_dim] from q of the same shape. Each token's result depends on its own query and cache alone, bit for
// bit: not on the other tokens, nor on threads. Fast for many tokens where neighbours share `pages`.
void attend(const KvShape& shape, const Scoring& scoring, const float* q, const Query* queries, size_t tokens, float* out);

// Neighbouring query tokens of one sequence, seen by one kv head: count * group rows, token by token.
struct Block {
  const float* q;  // of the first token, [heads, head_dim]
  const Query* queries;
  size_t count, kv_head;
};

// A row's softmax so far: [0] the largest score (-inf: nothing seen), [1] sum of exp(score - largest), [16..] weighted values.
constexpr size_t kStateHead = 16;
ANYBIT_INLINE size_t state_floats(const KvShape& shape) { return kStateHead + shape.head_dim; }

constexpr size_t kBlockRows = 48;  // where there are no tiles: a multiple of every product's rows

// What attend_split wants as scratch for one block, 64-byte aligned.
ANYBIT_INLINE size_t attention_scratch(const KvShape& shape, size_t rows) {
  const size_t padded = (rows + 31) / 32 * 32, dim = (shape.head_dim + 31) / 32 * 32;
  return padded * (2 * dim + 128) + (dim + 4) * kPageTokens;
}

struct AttentionTable {
  // One kv head's block of a page, slot = position % 64.
  void (*write_head)(const KvShape& shape, std::uint8_t* block, size_t slot, const float* key, const float* value);
  // A kv head's blocks of a full open page and of the page that it becomes.
  void (*seal_head)(const KvShape& shape, const std::uint8_t* open, std::uint8_t* sealed);
  // states [rows] over pages [split * kSplitPages, (split + 1) * kSplitPages), from nothing.
  void (*attend_split)(const KvShape& shape, const Scoring& scoring, const Block& block, size_t split, float* states,
                       float* scratch);
  void (*merge)(const KvShape& shape, size_t rows, const float* later, float* states);
  // out of the block's first token, [heads, head_dim].
  void (*finish)(const KvShape& shape, const Block& block, const float* states, float* out);
  size_t prompt_rows;  // of a block: enough to pay for converting a page's codes once
};
ANYBIT_FOR_TARGETS(extern const AttentionTable attention_table;)

}  // namespace anybit
