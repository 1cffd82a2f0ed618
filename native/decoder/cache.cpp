#include "decoder/cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "thread_pool.h"

namespace anybit {
namespace {

size_t pages_for(size_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

std::uint8_t* reserve(size_t bytes) {
  void* memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!memory) throw std::bad_alloc();
  return static_cast<std::uint8_t*>(memory);
}

float half_at(const std::uint8_t* halves, size_t i) {
  _Float16 value;
  std::memcpy(&value, halves + 2 * i, 2);
  return static_cast<float>(value);
}

// Entry (row, column) of codes [rows][columns] as attention/cpu.h lays them out, with range = {scale, minimum} below 16 bits.
float entry(const std::uint8_t* codes, size_t bits, size_t rows, size_t columns, size_t row, size_t column, const float* range) {
  if (bits == 16) return half_at(codes, row * columns + column);
  const size_t step = rows * bits / 8;
  const int shared = codes[row % step * columns + column] >> row / step * bits;
  return range[1] + range[0] * static_cast<float>(shared & ((1 << bits) - 1));
}

// Key and value [head_dim] of one slot out of a kv head's block of a page.
void read_head(const KvShape& shape, const std::uint8_t* block, size_t slot, float* key, float* value) {
  const size_t dim = shape.head_dim;
  const std::uint8_t *values = block + shape.key_bytes(), *keys_range = values + shape.value_bytes(),
                     *values_range = keys_range + shape.key_range_bytes();
  const size_t ranges = shape.channels ? dim : kPageTokens;
  for (size_t d = 0; d < dim; ++d) {
    const size_t at = shape.channels ? d : slot;
    float range[4] = {};
    if (shape.key_bits != 16) range[0] = half_at(keys_range, at), range[1] = half_at(keys_range, ranges + at);
    if (shape.value_bits != 16) range[2] = half_at(values_range, slot), range[3] = half_at(values_range, kPageTokens + slot);
    key[d] = entry(block, shape.key_bits, dim, kPageTokens, d, slot, range);
    value[d] = entry(values, shape.value_bits, kPageTokens, dim, slot, d, range + 2);
  }
}

}  // namespace

KvCache::KvCache(const KvShape& shape, const KvPolicy& policy, size_t layers, size_t tokens, size_t slots)
    : shape_(shape),
      policy_(policy),
      layers_(layers),
      pages_(pages_for(tokens) + slots - 1),
      pool_(reserve(layers * pages_ * shape.page_bytes()), std::free),
      open_(reserve(slots * layers * kept() * shape.open().page_bytes()), std::free),
      table_(slots * layers * pages_),
      references_(pages_),
      holds_(pages_),
      sequences_(slots) {
  for (size_t page = pages_; page-- > 0;) free_.push_back(static_cast<std::uint32_t>(page));
  for (auto& sequence : sequences_) sequence.pages.reserve(pages_);
  due_.reserve(slots);
}

std::uint8_t* KvCache::open_page(size_t layer, size_t slot, size_t index) const {
  const size_t at = index < policy_.sinks ? index : policy_.sinks + index % ring();
  return open_.get() + ((slot * layers_ + layer) * kept() + at) * shape_.open().page_bytes();
}

std::uint8_t* KvCache::pool_page(size_t layer, size_t slot, size_t index) const {
  return pool_.get() + (layer * pages_ + sequences_[slot].pages[index]) * shape_.page_bytes();
}

void KvCache::place(size_t slot, size_t index, bool open) {
  for (size_t layer = 0; layer < layers_; ++layer)
    table_[(slot * layers_ + layer) * pages_ + index] = open ? open_page(layer, slot, index) + 1 : pool_page(layer, slot, index);
}

size_t KvCache::pages_needed(size_t slot, size_t tokens) const {
  const Sequence& sequence = sequences_[slot];
  return pages_for(sequence.length + tokens) - sequence.pages.size();
}

size_t KvCache::append(size_t slot) {
  Sequence& sequence = sequences_[slot];
  const size_t position = sequence.length++, index = position / kPageTokens;
  if (policy_.seal && position % kPageTokens == 0 && index > policy_.window) {
    const size_t full = index - 1 - policy_.window;
    if (sealed_before(full, position) && is_open(pages(0, slot)[full])) {
      due_.push_back({slot, full});
      place(slot, full, false);
    }
  }
  sequence.newest = std::max(sequence.newest, index);
  if (index == sequence.pages.size()) {
    const size_t page = free_.back();
    free_.pop_back();
    references_[page] = 1;
    sequence.pages.push_back(static_cast<std::uint32_t>(page));
    place(slot, index, policy_.seal);
  }
  return position;
}

void KvCache::seal(size_t layer) {
  const size_t heads = shape_.kv_heads;
  auto body = [&](size_t begin, size_t end) noexcept {
    for (size_t i = begin; i < end; ++i) {
      const Due& due = due_[i / heads];
      const size_t head = i % heads;
      ANYBIT_ACTIVE(attention_table).seal_head(
          shape_, open_page(layer, due.slot, due.page) + head * shape_.open().head_bytes(),
          pool_page(layer, due.slot, due.page) + head * shape_.head_bytes());
    }
  };
  if (!due_.empty()) parallel_for(due_.size() * heads, 1, body);
}

void KvCache::read(size_t layer, size_t slot, float* keys, float* values) const {
  const size_t length = sequences_[slot].length, dim = shape_.head_dim;
  for (size_t head = 0; head < shape_.kv_heads; ++head)
    for (size_t t = 0; t < length; ++t) {
      const std::uint8_t* page = pages(layer, slot)[t / kPageTokens];
      const size_t to = (head * length + t) * dim;
      read_head(shape_of(shape_, page), head_of(shape_, page, head), t % kPageTokens, keys + to, values + to);
    }
}

void KvCache::truncate(size_t slot, size_t length) {
  Sequence& sequence = sequences_[slot];
  const size_t left = pages_for(length);
  size_t first = left;  // page that has to be open, from here on
  if (policy_.seal)
    while (first > policy_.sinks && !sealed_before(first - 1, length)) --first;
  for (size_t index = first; index < left; ++index) refuse_to_open(slot, index, length);
  if (length % kPageTokens) refuse_to_open(slot, length / kPageTokens, length);
  for (size_t index = first; index < left; ++index) place(slot, index, true);
  sequence.length = length;
  if (length == 0) sequence.newest = 0;
  sequence.attached = std::min(sequence.attached, left);
  while (sequence.pages.size() > left) {
    drop(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

// A page that is to be written again must be this slot's alone, and what it held in 16 bits still there.
void KvCache::refuse_to_open(size_t slot, size_t index, size_t length) const {
  const Sequence& sequence = sequences_[slot];
  const std::string start = "cannot forget down to token " + std::to_string(length) + ": ";
  if (index < sequence.attached || references_[sequence.pages[index]] > 1)
    throw std::invalid_argument(start + "page " + std::to_string(index) + " is shared; keep whole pages of it, or start again");
  if (policy_.seal && !is_open(pages(0, slot)[index]) && index + ring() <= sequence.newest)
    throw std::invalid_argument(start + "what page " + std::to_string(index) + " held was sealed and is not kept any more; keep " +
                                std::to_string((index + 1 + policy_.window) * kPageTokens) + " or more, or start again");
}

void KvCache::drop(size_t page) {
  if (--references_[page] == 0) free_.push_back(static_cast<std::uint32_t>(page));
}

size_t KvCache::hold(size_t slot, size_t index) {
  const Sequence& sequence = sequences_[slot];
  if ((index + 1) * kPageTokens > sequence.length || is_open(pages(0, slot)[index]))
    throw std::invalid_argument("page " + std::to_string(index) + " of slot " + std::to_string(slot) + " is not finished");
  const size_t page = sequence.pages[index];
  ++references_[page], ++holds_[page];
  return page;
}

void KvCache::release(size_t page) {
  if (page >= pages_ || holds_[page] == 0) throw std::invalid_argument("page " + std::to_string(page) + " is not held");
  --holds_[page];
  drop(page);
}

void KvCache::attach(size_t slot, const std::uint32_t* pages, size_t count) {
  Sequence& sequence = sequences_[slot];
  if (sequence.length) throw std::invalid_argument("slot " + std::to_string(slot) + " is not empty");
  if (policy_.seal && (policy_.sinks || policy_.window)) throw std::invalid_argument("a cache with sinks or a window cannot share pages");
  for (size_t index = 0; index < count; ++index)
    if (pages[index] >= pages_ || references_[pages[index]] == 0)
      throw std::invalid_argument("page " + std::to_string(pages[index]) + " is not in use");
  sequence.pages.assign(pages, pages + count);
  for (size_t index = 0; index < count; ++index) ++references_[pages[index]], place(slot, index, false);
  sequence.length = count * kPageTokens, sequence.attached = count, sequence.newest = count ? count - 1 : 0;
}

}  // namespace anybit
