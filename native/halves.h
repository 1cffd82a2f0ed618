// Rows of bfloat16 around kernels that compute in float32: models come in bfloat16, and what lies between stays in the caches.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "targets.h"

namespace anybit {

// Rows of float32, or of bfloat16: taken as the float32 that they are, results rounded to nearest even.
struct Rows {
  const void* x;  // [tokens, columns]
  void* y;        // [tokens, rows]
  size_t tokens;
  bool halves;
};

struct HalvesTable {
  void (*widen)(const std::uint16_t* x, float* y, size_t count);
  void (*narrow)(const float* x, std::uint16_t* y, size_t count);
};
ANYBIT_FOR_TARGETS(extern const HalvesTable halves_table;)

// Memory of one thread that only grows, 64-byte aligned.
template <class T>
class Scratch {
 public:
  T* at_least(size_t count) {
    if (count > size_) data_.reset(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t{64}))), size_ = count;
    return data_.get();
  }

 private:
  struct Delete {
    void operator()(T* data) const { operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Delete> data_;
  size_t size_ = 0;
};

// Blocks [first, last) of 16 rows of y [tokens, rows], a few at a time by multiply(y, y_stride, first, last), which writes float32.
// `first` stays even if it is.
template <class Multiply>
void in_halves(size_t tokens, size_t rows, std::uint16_t* y, size_t first, size_t last, Multiply&& multiply) {
  constexpr size_t kRows = 16, kFloats = 32 * 1024;
  static thread_local Scratch<float> scratch;
  const auto narrow = ANYBIT_ACTIVE(halves_table).narrow;
  const size_t pairs = std::max<size_t>(1, kFloats / (2 * kRows * std::max<size_t>(tokens, 1)));
  for (size_t stop; first < last; first = stop) {
    stop = std::min(last, first + 2 * pairs);
    const size_t begin = first * kRows, width = (stop - first) * kRows, kept = std::min(width, rows - begin);
    float* found = scratch.at_least(tokens * width);
    multiply(found - begin, width, first, stop);
    for (size_t t = 0; t < tokens; ++t) narrow(found + t * width, y + t * rows + begin, kept);
  }
}

}  // namespace anybit
