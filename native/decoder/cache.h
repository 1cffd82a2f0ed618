// The key-value cache: pages of one pool, and for every sequence slot the pages that hold its tokens, in every layer.
#pragma once

#include <memory>
#include <vector>

#include "attention/cpu.h"

namespace anybit {

class KvCache {
 public:
  // Pages for `tokens` tokens in whole pages of each slot. The memory is reserved, not touched: it becomes resident as it fills.
  KvCache(const KvShape& shape, size_t layers, size_t tokens, size_t slots);

  const KvShape& shape() const { return shape_; }
  size_t slots() const { return sequences_.size(); }
  size_t length(size_t slot) const { return sequences_[slot].length; }
  size_t free_pages() const { return free_.size(); }

  // How many of the free pages `tokens` more tokens of a slot would take.
  size_t pages_needed(size_t slot, size_t tokens) const;

  // Appends one token to a slot and returns its position. The caller has made sure that there is a page.
  size_t append(size_t slot);

  // Forgets positions from `length` on; 0 empties the slot.
  void truncate(size_t slot, size_t length);

  // Keys and values of all positions of a slot in a layer as attention sees them, each [kv_heads, length, head_dim].
  void read(size_t layer, size_t slot, float* keys, float* values) const;

  // Page p of a slot in a layer holds its positions [64 p, 64 p + 64).
  std::uint8_t* const* pages(size_t layer, size_t slot) const { return table_.data() + (slot * layers_ + layer) * pages_; }

 private:
  struct Sequence {
    size_t length = 0;
    std::vector<std::uint32_t> pages;
  };

  KvShape shape_;
  size_t layers_, pages_;                            // pages_: of the whole pool, in each layer
  std::unique_ptr<std::uint8_t, void (*)(void*)> pool_;  // [layers][pages][page_bytes]
  std::vector<std::uint8_t*> table_;                 // [slots][layers][pages]
  std::vector<std::uint32_t> free_;
  std::vector<Sequence> sequences_;
};

}  // namespace anybit
