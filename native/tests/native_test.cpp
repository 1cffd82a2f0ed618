// The native core under sanitizers: exact-size heap buffers, so one byte read or written outside aborts the run.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "thread_pool.h"

using namespace anybit;

namespace {

std::atomic<int> checks{0};

void expect(bool ok, const char* what, size_t a = 0, size_t b = 0, size_t c = 0) {
  ++checks;
  if (ok) return;
  std::fprintf(stderr, "FAILED on %s: %s (%zu, %zu, %zu)\n", name(active_isa()), what, a, b, c);
  std::exit(1);
}

struct Case {
  size_t bits, rows, columns, group, groups;
  std::vector<std::uint8_t> codes, planes, zero;
  std::vector<std::uint16_t> scale;
  std::vector<float> x;

  Case(size_t bits_, size_t rows_, size_t columns_, size_t group_)
      : bits(bits_), rows(rows_), columns(columns_), group(group_), groups((columns_ + group_ - 1) / group_) {
    std::mt19937 random(static_cast<unsigned>(bits * 10007 + rows * 101 + columns));
    codes.resize(rows * columns), zero.resize(rows * groups), scale.resize(rows * groups), x.resize(2 * columns);
    for (auto& c : codes) c = random() & ((1u << bits) - 1);
    for (auto& z : zero) z = random() & ((1u << bits) - 1);
    for (auto& s : scale) s = random() % 2 ? 0x3C00 : 0x3800;  // 1.0 or 0.5: every sum below is exact
    for (auto& v : x) v = static_cast<float>(static_cast<int>(random() % 17) - 8);
    planes.resize(bits * rows * ((columns + 7) / 8));
  }

  Planes view() const { return {planes.data(), bits, rows, columns}; }
  Affine affine(bool symmetric) const { return {scale.data(), symmetric ? nullptr : zero.data(), group, groups}; }
  float weight(size_t n, size_t k, bool symmetric) const {
    const size_t at = n * groups + k / group;
    const int z = symmetric ? 1 << (bits - 1) : zero[at];
    return (scale[at] == 0x3C00 ? 1.0f : 0.5f) * static_cast<float>(codes[n * columns + k] - z);
  }
};

void check_planes(Case& c) {
  pack_planes(c.codes.data(), c.planes.data(), c.bits, c.rows, c.columns);
  const size_t bytes = (c.columns + 7) / 8;
  for (size_t i = 0; i < c.bits; ++i)
    for (size_t n = 0; n < c.rows; ++n)
      for (size_t k = 0; k < bytes * 8; ++k) {
        const int want = k < c.columns ? (c.codes[n * c.columns + k] >> (c.bits - 1 - i)) & 1 : 0;
        expect(((c.planes[(i * c.rows + n) * bytes + k / 8] >> (k % 8)) & 1) == want, "plane bit", i, n, k);
      }
  std::vector<std::uint8_t> back(c.codes.size());
  unpack_planes(c.view(), back.data());
  expect(back == c.codes, "unpack", c.bits, c.rows, c.columns);
}

void check_linear(const Case& c, bool symmetric) {
  std::vector<float> values(c.rows * c.columns), y(2 * c.rows);
  decode_affine(c.view(), c.affine(symmetric), values.data(), 0, c.rows);
  linear_a16(c.view(), c.affine(symmetric), c.x.data(), 2, y.data());
  for (size_t n = 0; n < c.rows; ++n) {
    double sum[2] = {0, 0};
    for (size_t k = 0; k < c.columns; ++k) {
      expect(values[n * c.columns + k] == c.weight(n, k, symmetric), "decode", n, k, c.bits);
      for (size_t t = 0; t < 2; ++t) sum[t] += static_cast<double>(c.weight(n, k, symmetric)) * c.x[t * c.columns + k];
    }
    // Small integers and halves: float32 holds every intermediate exactly, so equality is demanded.
    for (size_t t = 0; t < 2; ++t) expect(y[t * c.rows + n] == static_cast<float>(sum[t]), "linear", n, t, c.columns);
  }
}

void check_kernels() {
  const size_t columns[] = {1, 3, 4, 7, 8, 9, 31, 33, 63, 64, 65, 130};
  for (size_t bits = 1; bits <= 8; ++bits)
    for (size_t rows : {1, 7, 17, 33})
      for (size_t k : columns)
        for (size_t group : {size_t{3}, size_t{32}, k}) {
          Case c(bits, rows, k, group < k ? group : k);
          check_planes(c);
          check_linear(c, false);
          check_linear(c, true);
        }
}

void check_pool() {
  for (int count : {1, 2, 7}) {
    set_threads(count);
    expect(threads() == count, "thread count", count);
    for (size_t items : {0, 1, 15, 16, 17, 1000}) {
      std::vector<int> seen(items, 0);
      auto body = [&](size_t begin, size_t end) noexcept {
        for (size_t i = begin; i < end; ++i) ++seen[i];
      };
      for (int repeat = 0; repeat < 50; ++repeat) parallel_for(items, 16, body);
      for (size_t i = 0; i < items; ++i) expect(seen[i] == 50, "every item once", i, items, count);
    }
  }
}

// Two callers at once, while a third keeps resizing the pool: nothing is lost, nobody waits for ever.
void check_contention() {
  std::thread callers[2];
  for (auto& caller : callers)
    caller = std::thread([] {
      for (int repeat = 0; repeat < 300; ++repeat) {
        std::vector<int> seen(777, 0);
        auto body = [&](size_t begin, size_t end) noexcept {
          for (size_t i = begin; i < end; ++i) ++seen[i];
        };
        parallel_for(seen.size(), 8, body);
        for (int s : seen) expect(s == 1, "contended item");
      }
    });
  for (int repeat = 0; repeat < 20; ++repeat) set_threads(1 + repeat % 3);
  for (auto& caller : callers) caller.join();
}

template <class F>
void expect_throws(F body, const char* what) {
  bool thrown = false;
  try {
    body();
  } catch (const std::invalid_argument&) {
    thrown = true;
  }
  expect(thrown, what);
}

}  // namespace

int main() {
  expect_throws([] { set_isa("mmx"); }, "unknown instruction set is refused");
  expect_throws([] { set_threads(0); }, "no threads are refused");
  check_pool();
  check_contention();
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_kernels();
    std::printf("%s ok\n", isa.c_str());
  }
  std::printf("%d checks passed\n", checks.load());
}
