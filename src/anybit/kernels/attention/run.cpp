#include <algorithm>
#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

constexpr size_t kTasksPerThread = 4;

// At least `count` floats of the calling thread, aligned; kept between calls, one slot per use.
template <int kSlot>
float* scratch(size_t count) {
  static thread_local std::vector<float> floats;
  constexpr size_t kAlign = 16;
  if (floats.size() < count + kAlign) floats.resize(count + kAlign);
  const auto address = reinterpret_cast<std::uintptr_t>(floats.data());
  return floats.data() + (64 - address % 64) % 64 / sizeof(float);
}

// The work of one call: blocks of neighbouring tokens of one sequence, times kv heads, times (when there are few) splits.
struct Plan {
  std::vector<Block> blocks;  // kv_head is filled in by whoever takes one
  size_t splits = 0;          // the largest number that a block reaches
  size_t rows = 0;            // of the longest block
  size_t pages = 0;           // read, over all blocks

  void make(const KvShape& shape, const float* q, const Query* queries, size_t tokens, size_t block_rows) {
    const size_t fair = tokens * shape.kv_heads / (kTasksPerThread * static_cast<size_t>(threads()));
    const size_t longest = std::clamp<size_t>(fair, 1, std::max<size_t>(block_rows / shape.group(), 1));
    blocks.clear(), splits = rows = pages = 0;
    for (size_t t = 0; t < tokens; ++t) {
      splits = std::max(splits, queries[t].last / kPageTokens / kSplitPages + 1);
      const bool more = !blocks.empty() && blocks.back().count < longest && blocks.back().queries->pages == queries[t].pages;
      if (!more) {
        blocks.push_back({q + t * shape.heads * shape.head_dim, queries + t, 0, 0});
        pages += queries[t].last / kPageTokens - queries[t].first / kPageTokens + 1;
      }
      rows = std::max(rows, ++blocks.back().count * shape.group());
    }
  }
};

Block with_head(const Block& block, size_t kv_head) { return {block.q, block.queries, block.count, kv_head}; }

// Enough tasks: each goes through its splits in order.
void attend_whole(const KvShape& shape, const Scoring& scoring, const Plan& plan, size_t work, float* q_out, const float* q) {
  const AttentionTable& k = ANYBIT_ACTIVE(attention_table);
  const size_t tasks = plan.blocks.size() * shape.kv_heads;
  parallel_rows(tasks, 1, work, [&](size_t begin, size_t end) noexcept {
    for (size_t i = begin; i < end; ++i) {
      // Backwards: late tokens see the most, and the longest tasks should not come last.
      const Block block = with_head(plan.blocks[(tasks - 1 - i) / shape.kv_heads], i % shape.kv_heads);
      const size_t rows = block.count * shape.group(), floats = rows * state_floats(shape);
      float* states = scratch<0>(2 * floats + attention_scratch(shape, rows));
      float *later = states + floats, *rest = later + floats;
      size_t first = block.queries->first, last = block.queries->last;
      for (size_t t = 1; t < block.count; ++t)
        first = std::min(first, block.queries[t].first), last = std::max(last, block.queries[t].last);
      constexpr size_t kSplit = kPageTokens * kSplitPages;
      k.attend_split(shape, scoring, block, first / kSplit, states, rest);
      for (size_t split = first / kSplit + 1; split <= last / kSplit; ++split) {
        k.attend_split(shape, scoring, block, split, later, rest);
        k.merge(shape, rows, later, states);
      }
      k.finish(shape, block, states, q_out + (block.q - q));
    }
  });
}

// Few tasks, long contexts: splits run side by side, then their states are merged in the same order.
void attend_in_splits(const KvShape& shape, const Scoring& scoring, const Plan& plan, size_t work, float* q_out, const float* q) {
  const AttentionTable& k = ANYBIT_ACTIVE(attention_table);
  const size_t tasks = plan.blocks.size() * shape.kv_heads, floats = plan.rows * state_floats(shape);
  float* states = scratch<1>(tasks * plan.splits * floats);
  const auto block_of = [&](size_t task) { return with_head(plan.blocks[task / shape.kv_heads], task % shape.kv_heads); };
  parallel_rows(tasks * plan.splits, 1, work / plan.splits, [&](size_t begin, size_t end) noexcept {
    for (size_t i = begin; i < end; ++i) {
      const Block block = block_of(i / plan.splits);
      float* rest = scratch<0>(attention_scratch(shape, block.count * shape.group()));
      k.attend_split(shape, scoring, block, i % plan.splits, states + i * floats, rest);
    }
  });
  for (size_t task = 0; task < tasks; ++task) {
    const Block block = block_of(task);
    float* sum = states + task * plan.splits * floats;
    for (size_t split = 1; split < plan.splits; ++split) k.merge(shape, block.count * shape.group(), sum + split * floats, sum);
    k.finish(shape, block, sum, q_out + (block.q - q));
  }
}

}  // namespace

void kv_write(const KvShape& shape, std::uint8_t* page, size_t position, const float* key, const float* value) {
  const AttentionTable& k = ANYBIT_ACTIVE(attention_table);
  for (size_t h = 0; h < shape.kv_heads; ++h)
    k.write_head(shape_of(shape, page), head_of(shape, page, h), position % kPageTokens, key + h * shape.head_dim,
                 value + h * shape.head_dim);
}

void kv_seal(const KvShape& shape, const std::uint8_t* open, std::uint8_t* sealed) {
  for (size_t h = 0; h < shape.kv_heads; ++h)
    ANYBIT_ACTIVE(attention_table).seal_head(shape, open + h * shape.open().head_bytes(), sealed + h * shape.head_bytes());
}

// Threads share out kv heads, not tokens: tokens of a page share bytes.
void kv_write(const KvShape& shape, const Query* queries, size_t tokens, const float* keys, const float* values) {
  const AttentionTable& k = ANYBIT_ACTIVE(attention_table);
  constexpr size_t kWorkPerElement = 32;  // writing an element costs about as much as reading four bytes
  const size_t work = tokens * shape.head_dim * 2 * kWorkPerElement;
  parallel_rows(shape.kv_heads, 1, work, [&](size_t begin, size_t end) noexcept {
    for (size_t h = begin; h < end; ++h)
      for (size_t t = 0; t < tokens; ++t) {
        const size_t position = queries[t].last, at = (t * shape.kv_heads + h) * shape.head_dim;
        std::uint8_t* page = queries[t].pages[position / kPageTokens];
        k.write_head(shape_of(shape, page), head_of(shape, page, h), position % kPageTokens, keys + at, values + at);
      }
  });
}

void attend(const KvShape& shape, const Scoring& scoring, const float* q, const Query* queries, size_t tokens, float* out) {
  static thread_local Plan plan;
  plan.make(shape, q, queries, tokens, scoring.prompt ? ANYBIT_ACTIVE(attention_table).prompt_rows : kBlockRows);
  if (!tokens) return;
  const size_t tasks = plan.blocks.size() * shape.kv_heads;
  const size_t passes = (plan.rows + 5) / 6;  // over a page, in rows of tiles
  const size_t work = plan.pages * shape.head_bytes() * 8 * passes / plan.blocks.size();
  const bool enough = threads() == 1 || tasks >= kTasksPerThread * static_cast<size_t>(threads()) || plan.splits == 1;
  (enough ? attend_whole : attend_in_splits)(shape, scoring, plan, work, out, q);
}

}  // namespace anybit
