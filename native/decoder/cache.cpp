#include "decoder/cache.h"

#include <cstdlib>
#include <new>

namespace anybit {
namespace {

size_t pages_for(size_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

std::uint8_t* reserve(size_t bytes) {
  void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!memory) throw std::bad_alloc();
  return static_cast<std::uint8_t*>(memory);
}

}  // namespace

KvCache::KvCache(const KvShape& shape, size_t layers, size_t tokens, size_t slots)
    : shape_(shape),
      layers_(layers),
      pages_(pages_for(tokens) + slots - 1),
      pool_(reserve(layers * pages_ * shape.page_bytes()), std::free),
      table_(slots * layers * pages_),
      sequences_(slots) {
  for (size_t page = pages_; page-- > 0;) free_.push_back(static_cast<std::uint32_t>(page));
  for (auto& sequence : sequences_) sequence.pages.reserve(pages_);
}

size_t KvCache::pages_needed(size_t slot, size_t tokens) const {
  const Sequence& sequence = sequences_[slot];
  return pages_for(sequence.length + tokens) - sequence.pages.size();
}

size_t KvCache::append(size_t slot) {
  Sequence& sequence = sequences_[slot];
  const size_t position = sequence.length++, index = position / kPageTokens;
  if (index == sequence.pages.size()) {
    const size_t page = free_.back();
    free_.pop_back();
    sequence.pages.push_back(static_cast<std::uint32_t>(page));
    for (size_t layer = 0; layer < layers_; ++layer)
      table_[(slot * layers_ + layer) * pages_ + index] = pool_.get() + (layer * pages_ + page) * shape_.page_bytes();
  }
  return position;
}

void KvCache::truncate(size_t slot, size_t length) {
  Sequence& sequence = sequences_[slot];
  sequence.length = length;
  while (sequence.pages.size() > pages_for(length)) {
    free_.push_back(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

}  // namespace anybit
