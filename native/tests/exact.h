// For tests under sanitizers: arrays of exactly the documented size, so that one byte read or written outside aborts the run.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "dispatch.h"

namespace anybit {

inline void expect(bool ok, const char* what, std::size_t a = 0, std::size_t b = 0, std::size_t c = 0) {
  if (ok) return;
  std::fprintf(stderr, "FAILED on %s: %s (%zu, %zu, %zu)\n", name(active_isa()), what, a, b, c);
  std::exit(1);
}

// Ends where a page begins that nobody may touch: address sanitizing does not see what gathers and tile loads read, the
// hardware does. What lies before the array in its first page is poisoned. 64-byte aligned if it is a multiple of 64 bytes.
template <class T>
class Exact {
 public:
  explicit Exact(std::size_t count, T value = {}) : size_(count), whole_((count * sizeof(T) + kPage - 1) / kPage * kPage) {
    void* mapped = mmap(nullptr, whole_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(mapped != MAP_FAILED, "memory");
    pages_ = static_cast<char*>(mapped);
    expect(!mprotect(pages_ + whole_, kPage, PROT_NONE), "guard page");
    data_ = reinterpret_cast<T*>(pages_ + whole_ - count * sizeof(T));
    std::fill(begin(), end(), value);
    ASAN_POISON_MEMORY_REGION(pages_, whole_ - count * sizeof(T));
  }
  ~Exact() {
    ASAN_UNPOISON_MEMORY_REGION(pages_, whole_);
    munmap(pages_, whole_ + kPage);
  }
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
  static constexpr std::size_t kPage = 4096;
  std::size_t size_, whole_;  // whole_: bytes of its pages, without the guard
  char* pages_;
  T* data_;
};

// Integers of low..high.
template <class T>
void fill(Exact<T>& values, std::mt19937& random, int low, int high) {
  for (T& value : values) value = static_cast<T>(std::uniform_int_distribution<int>(low, high)(random));
}

}  // namespace anybit
