// The native core under sanitizers: exact-size heap buffers, so one byte read or written outside aborts the run.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "embedding/cpu.h"
#include "exact.h"
#include "hadamard/cpu.h"
#include "linear_bf16/cpu.h"
#include "linear_w_a16/cpu.h"
#include "planes/cpu.h"
#include "quantize_activations/cpu.h"
#include "thread_pool.h"

using namespace anybit;

namespace {

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
  decode(c.view(), c.affine(symmetric), values.data(), 0, c.rows);
  linear_w_a16(c.view(), c.affine(symmetric), c.x.data(), 2, y.data());
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

// Binary-coded weights whose alphas and offsets are 1 or 1/2, and codebooks that say the same: every sum is exact again.
void check_tables(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.columns));
  std::vector<std::uint16_t> alpha(c.rows * c.groups * c.bits), table(c.rows << c.bits);
  for (auto& a : alpha) a = random() % 2 ? 0x3C00 : 0x3800;
  for (auto& entry : table) entry = static_cast<std::uint16_t>(0x3C00 + (random() % 4 << 10));  // 1, 2, 4 or 8
  std::vector<float> values(c.rows * c.columns), y(2 * c.rows), expanded(values.size());
  const auto expect_product = [&](const char* what) {
    for (size_t n = 0; n < c.rows; ++n)
      for (size_t t = 0; t < 2; ++t) {
        double sum = 0;
        for (size_t k = 0; k < c.columns; ++k) sum += static_cast<double>(expanded[n * c.columns + k]) * c.x[t * c.columns + k];
        expect(values == expanded && y[t * c.rows + n] == static_cast<float>(sum), what, n, t, c.columns);
      }
  };
  const BinaryCoded binary{alpha.data(), c.scale.data(), c.group, c.groups};
  const Codebook codebook{table.data()};
  for (size_t n = 0; n < c.rows; ++n)
    for (size_t k = 0; k < c.columns; ++k) {
      const size_t at = n * c.groups + k / c.group;
      float value = c.scale[at] == 0x3C00 ? 1.0f : 0.5f;
      for (size_t i = 0; i < c.bits; ++i) {
        const float size = alpha[at * c.bits + i] == 0x3C00 ? 1.0f : 0.5f;
        value += c.codes[n * c.columns + k] >> (c.bits - 1 - i) & 1 ? size : -size;
      }
      expanded[n * c.columns + k] = value;
    }
  decode(c.view(), binary, values.data(), 0, c.rows);
  linear_w_a16(c.view(), binary, c.x.data(), 2, y.data());
  expect_product("binary-coded");
  for (size_t n = 0; n < c.rows; ++n)
    for (size_t k = 0; k < c.columns; ++k)
      expanded[n * c.columns + k] = static_cast<float>(1 << ((table[(n << c.bits) + c.codes[n * c.columns + k]] - 0x3C00) >> 10));
  decode(c.view(), codebook, values.data(), 0, c.rows);
  linear_w_a16(c.view(), codebook, c.x.data(), 2, y.data());
  expect_product("codebook");
}

void check_embedding(const Case& c) {
  const std::vector<std::int64_t> ids = {static_cast<std::int64_t>(c.rows) - 1, 0};
  std::vector<float> out(ids.size() * c.columns);
  embed_rows(c.view(), c.affine(false), ids.data(), ids.size(), 2.0f, out.data());
  for (size_t t = 0; t < ids.size(); ++t)
    for (size_t k = 0; k < c.columns; ++k)
      expect(out[t * c.columns + k] == 2 * c.weight(static_cast<size_t>(ids[t]), k, false), "embedding", t, k, c.bits);
}

// Small integers again: scale * code gives them back, as 127 is among them.
void check_activations(size_t columns, size_t group) {
  const size_t groups = (columns + group - 1) / group, stride = activation_stride(columns);
  std::vector<float> gates(2 * 2 * columns, 0.0f), scale(2 * groups), sums(2 * groups), y(2 * columns);
  std::vector<float> x(2 * columns);
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = i % columns % group ? static_cast<float>(static_cast<int>(i * 37 % 253) - 126) : 127.0f;
  std::vector<std::int8_t> codes(2 * stride, 1);
  const Activations out{codes.data(), scale.data(), sums.data(), 2, columns, stride, group, groups};
  quantize_rows(x.data(), out, 0, 2);
  for (size_t t = 0; t < 2; ++t)
    for (size_t k = 0; k < stride; ++k)
      expect(codes[t * stride + k] == (k < columns ? x[t * columns + k] : 0), "activation code", t, k, group);
  std::vector<float> weight(columns, 0.0f);
  rms_norm_rows(x.data(), weight.data(), false, 1e-5f, y.data(), columns, 0, 2);
  for (float v : y) expect(v == 0, "normalized by a zero weight");
  rms_norm_rows(x.data(), weight.data(), true, 1e-5f, y.data(), columns, 0, 2);
  quantize_rows(y.data(), out, 0, 2);
  expect(codes[0] == 127, "largest is 127", columns, group);
  gate_rows(gates.data(), Gate::gelu_tanh, y.data(), columns, 0, 2);
  quantize_rows(y.data(), out, 0, 2);
  for (std::int8_t c : codes) expect(c == 0, "zero gate", columns);
}

void check_float_kernels(size_t columns) {
  std::vector<std::uint16_t> weight(7 * columns, 0x4000);  // 2.0
  std::vector<float> x(5 * columns, 3.0f), y(5 * 7), row(columns, 1.0f);
  linear_bf16(weight.data(), x.data(), 5, 7, columns, y.data());
  for (float v : y) expect(v == 6.0f * static_cast<float>(columns), "linear_bf16", columns);
  const size_t block = columns & -columns;
  hadamard_rows(row.data(), 1, columns, block);
  for (size_t k = 0; k < columns; ++k) expect(k % block ? row[k] == 0 : row[k] > 0.99f, "hadamard", k, columns);
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
          check_embedding(c);
          check_tables(c);
        }
  for (size_t k : columns)
    for (size_t group : {size_t{32}, size_t{64}, k}) check_activations(k, group), check_float_kernels(k);
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
    std::atomic<int> inner_items{0};
    auto inner = [&](size_t begin, size_t end) noexcept { inner_items += static_cast<int>(end - begin); };
    auto outer = [&](size_t begin, size_t end) noexcept {
      for (size_t i = begin; i < end; ++i) parallel_for(10, 1, inner);
    };
    parallel_for(40, 1, outer);
    expect(inner_items == 400, "a job inside a task", count);
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
}
