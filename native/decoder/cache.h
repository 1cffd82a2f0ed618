// The key-value cache: pages of one pool, and for every sequence slot the pages that hold its tokens, in every layer.
#pragma once

#include <memory>
#include <vector>

#include "attention/cpu.h"

namespace anybit {

// When pages are sealed (attention/cpu.h): never (token by token, codes are written at once), or with `seal` page p before position
// 64 (p + 1 + window) is written, so what a token sees depends on its position alone; the first `sinks` pages stay open.
struct KvPolicy {
  bool seal = false;
  size_t sinks = 0, window = 0;  // pages
};

class KvCache {
 public:
  // Pages for `tokens` tokens in whole pages of each slot. The memory is reserved, not touched: it becomes resident as it fills.
  KvCache(const KvShape& shape, const KvPolicy& policy, size_t layers, size_t tokens, size_t slots);

  const KvShape& shape() const { return shape_; }
  size_t slots() const { return sequences_.size(); }
  size_t length(size_t slot) const { return sequences_[slot].length; }
  size_t free_pages() const { return free_.size(); }
  size_t pool_pages() const { return pages_; }

  // How many slots and holds refer to each page of the pool, [pool_pages]; 0: it is free.
  const std::vector<std::uint32_t>& references() const { return references_; }

  // How many of the free pages `tokens` more tokens of a slot would take.
  size_t pages_needed(size_t slot, size_t tokens) const;

  // Whether `more` tokens after a slot's present ones begin a page, which pages are sealed for.
  bool turns(size_t slot, size_t more) const { return policy_.seal && (length(slot) + more) % kPageTokens == 0; }

  // Starts a pass. Of a sealing cache's slot, the tokens of one pass lie in one page.
  void begin() { due_.clear(); }

  // Appends one token to a slot and returns its position. The caller has made sure that there is a page.
  size_t append(size_t slot);

  // Seals, in one layer, the pages whose time this pass is; before anything of the layer is written or read.
  void seal(size_t layer);

  // Forgets positions from `length` on; 0 empties the slot. Sealed pages that the rest needs open are opened again: what they held
  // is kept for another page's length. Throws std::invalid_argument, without a change, where that is over, or where a page that is
  // shared would be written next.
  void truncate(size_t slot, size_t length);

  // Sequences that begin alike can share pages; nothing writes a page that has more than one reference. These three throw
  // std::invalid_argument, without a change, where they cannot be.
  //
  // Refers once more to page `index` of a slot, which must be full (and sealed, where pages are), and returns its number in the
  // pool. It stays as it is until it is released, whatever becomes of the slot.
  size_t hold(size_t slot, size_t index);

  // Takes back what one `hold` gave.
  void release(size_t page);

  // Begins an empty slot with `count` pages of the pool that are in use: its length is 64 count. Where pages are sealed there must
  // be no sinks and no window, whose 16-bit numbers only the sequence that wrote them has.
  void attach(size_t slot, const std::uint32_t* pages, size_t count);

  // Keys and values of all positions of a slot in a layer as attention sees them, each [kv_heads, length, head_dim].
  void read(size_t layer, size_t slot, float* keys, float* values) const;

  // Page p of a slot in a layer holds its positions [64 p, 64 p + 64); bit 0 of an open one is set.
  std::uint8_t* const* pages(size_t layer, size_t slot) const { return table_.data() + (slot * layers_ + layer) * pages_; }

 private:
  struct Sequence {
    size_t length = 0;
    std::vector<std::uint32_t> pages;
    size_t newest = 0;    // page that was ever begun
    size_t attached = 0;  // first pages, which this slot did not write
  };
  struct Due {
    size_t slot, page;
  };

  size_t kept() const { return policy_.seal ? policy_.sinks + ring() : 0; }
  size_t ring() const { return policy_.window + 2; }
  bool sealed_before(size_t page, size_t position) const {
    return page >= policy_.sinks && (page + 1 + policy_.window) * kPageTokens <= position;
  }
  std::uint8_t* open_page(size_t layer, size_t slot, size_t index) const;
  std::uint8_t* pool_page(size_t layer, size_t slot, size_t index) const;
  void place(size_t slot, size_t index, bool open);
  void refuse_to_open(size_t slot, size_t index, size_t length) const;
  void drop(size_t page);

  KvShape shape_;
  KvPolicy policy_;
  size_t layers_, pages_;                            // pages_: of the whole pool, in each layer
  std::unique_ptr<std::uint8_t, void (*)(void*)> pool_;  // [layers][pages][page_bytes]
  std::unique_ptr<std::uint8_t, void (*)(void*)> open_;  // [slots][layers][sinks, then a ring][bytes of an open page]
  std::vector<std::uint8_t*> table_;                 // [slots][layers][pages]
  std::vector<std::uint32_t> free_;
  std::vector<std::uint32_t> references_, holds_;    // [pages]; holds_: those of them that `hold` gave
  std::vector<Due> due_;                             // pages to seal in this pass
  std::vector<Sequence> sequences_;
};

}  // namespace anybit
