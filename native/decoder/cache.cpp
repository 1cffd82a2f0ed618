#include "decoder/cache.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>

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

// Entry (row, column) of codes [rows][columns] as attention/cpu.h lays them out, with range = {scale, minimum} at 8 and 4 bits.
float entry(const std::uint8_t* codes, size_t bits, size_t rows, size_t columns, size_t row, size_t column, const float* range) {
  if (bits == 16) return half_at(codes, row * columns + column);
  if (bits == 8) return range[1] + range[0] * static_cast<float>(codes[row * columns + column]);
  const size_t half = rows / 2;
  const std::uint8_t pair = codes[row % half * columns + column];
  return range[1] + range[0] * static_cast<float>(row < half ? pair & 15 : pair >> 4);
}

// Key and value [head_dim] of one slot out of a kv head's block of a page.
void read_head(const KvShape& shape, const std::uint8_t* block, size_t slot, float* key, float* value) {
  const size_t dim = shape.head_dim;
  const std::uint8_t *values = block + shape.code_bytes(), *scales = values + shape.code_bytes();
  float range[4] = {};
  if (shape.bits != 16)
    for (size_t i = 0; i < 4; ++i) range[i] = half_at(scales, i * kPageTokens + slot);
  for (size_t d = 0; d < dim; ++d) {
    key[d] = entry(block, shape.bits, dim, kPageTokens, d, slot, range);
    value[d] = entry(values, shape.bits, kPageTokens, dim, slot, d, range + 2);
  }
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

void KvCache::read(size_t layer, size_t slot, float* keys, float* values) const {
  const size_t length = sequences_[slot].length, dim = shape_.head_dim;
  for (size_t head = 0; head < shape_.kv_heads; ++head)
    for (size_t t = 0; t < length; ++t) {
      const std::uint8_t* block = pages(layer, slot)[t / kPageTokens] + head * shape_.head_bytes();
      const size_t to = (head * length + t) * dim;
      read_head(shape_, block, t % kPageTokens, keys + to, values + to);
    }
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
