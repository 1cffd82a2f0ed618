// For tests under sanitizers: arrays of exactly the documented size, so that one byte read or written outside aborts the run.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <random>

#include "dispatch.h"

namespace anybit {

inline void expect(bool ok, const char* what, std::size_t a = 0, std::size_t b = 0, std::size_t c = 0) {
  if (ok) return;
  std::fprintf(stderr, "FAILED on %s: %s (%zu, %zu, %zu)\n", name(active_isa()), what, a, b, c);
  std::exit(1);
}

// On the heap, 64-byte aligned.
template <class T>
class Exact {
 public:
  explicit Exact(std::size_t count, T value = {})
      : size_(count), data_(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t{64}))) {
    std::fill(begin(), end(), value);
  }
  ~Exact() { operator delete(data_, std::align_val_t{64}); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

 private:
  std::size_t size_;
  T* data_;
};

// Integers of low..high.
template <class T>
void fill(Exact<T>& values, std::mt19937& random, int low, int high) {
  for (T& value : values) value = static_cast<T>(std::uniform_int_distribution<int>(low, high)(random));
}

}  // namespace anybit
