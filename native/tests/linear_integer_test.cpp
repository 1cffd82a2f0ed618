// linear_bits and linear_lut under sanitizers: operands of exactly the documented sizes, against plain integers.
#include "exact.h"
#include "linear_bits/cpu.h"
#include "linear_lut/cpu.h"
#include "thread_pool.h"

using namespace anybit;

namespace {

// Codes [rows, columns], and with an offset for each group the values.
struct Codes {
  size_t rows, columns, group, groups;
  Exact<std::uint8_t> codes;
  Exact<std::int32_t> offset;

  Codes(size_t rows_, size_t columns_, size_t group_, size_t bits)
      : rows(rows_), columns(columns_), group(std::min(group_, columns_)), groups((columns + group - 1) / group),
        codes(rows * columns), offset(rows * groups) {
    std::mt19937 random(static_cast<unsigned>(rows * 131 + columns));
    fill(codes, random, 0, (1 << bits) - 1), fill(offset, random, -9, 9);
  }

  // sum over group g of (code + offset) x
  template <class X>
  long long product(size_t n, size_t g, const X& x) const {
    long long sum = 0;
    for (size_t k = g * group; k < std::min(columns, (g + 1) * group); ++k)
      sum += static_cast<long long>(codes[n * columns + k] + offset[n * groups + g]) * x(k);
    return sum;
  }
};

void check_bits(size_t bits, size_t x_bits, size_t rows, size_t columns, size_t group, size_t tokens) {
  const Codes w(rows, columns, group, bits), v(tokens, columns, columns, x_bits);
  const size_t stride = (columns + 511) / 512 * 8;
  Exact<std::uint64_t> words(rows * bits * stride);
  Exact<std::int32_t> sums(rows * w.groups), coefficients(bits), x_coefficients(x_bits), integers(tokens * rows * w.groups);
  Exact<float> scale(rows * w.groups, 0.5f), x_scale(tokens, 2.0f), y(tokens * rows);
  for (size_t i = 0; i < bits; ++i) coefficients[i] = 1 << (bits - 1 - i);
  for (size_t i = 0; i < x_bits; ++i) x_coefficients[i] = 1 << (x_bits - 1 - i);
  for (size_t n = 0; n < rows; ++n)
    for (size_t k = 0; k < columns; ++k) {
      const std::uint64_t code = w.codes[n * columns + k];
      sums[n * w.groups + k / w.group] += static_cast<int>(code);
      for (size_t i = 0; i < bits; ++i) words[(n * bits + i) * stride + k / 64] |= (code >> (bits - 1 - i) & 1) << k % 64;
    }
  const BitWeight weight{{words.data(), bits, stride}, w.offset.data(), sums.data(), scale.data(), rows, columns, w.group, w.groups};
  const BitCodes x{v.codes.data(), false, tokens, x_coefficients.data(), x_bits, -3, x_scale.data()};
  expect(linear_bits(weight, coefficients.data(), x, {nullptr, integers.data()}), "codes fit");
  expect(linear_bits(weight, coefficients.data(), x, {y.data(), nullptr}), "codes fit");
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < rows; ++n) {
      long long all = 0;
      for (size_t g = 0; g < w.groups; ++g) {
        const auto want = w.product(n, g, [&](size_t k) { return v.codes[t * columns + k] - 3; });
        expect(integers[(t * rows + n) * w.groups + g] == want, "linear_bits", n, columns, bits);
        all += want;
      }
      expect(y[t * rows + n] == static_cast<float>(all), "linear_bits float", n, columns, bits);
    }
}

void check_lut(size_t bits, size_t rows, size_t columns, size_t group, size_t tokens) {
  const Codes w(rows, columns, group, bits);
  const size_t blocks = (rows + 15) / 16, chunks = (columns + 31) / 32;
  Exact<std::uint8_t> lines(blocks * chunks * bits * 64);
  Exact<std::int8_t> coefficients(bits), x(tokens * columns);
  Exact<std::int32_t> offset(blocks * w.groups * 16), integers(tokens * rows * w.groups);
  Exact<float> scale(blocks * w.groups * 16, 0.5f), x_scale(tokens, 2.0f), y(tokens * rows);
  std::mt19937 random(static_cast<unsigned>(columns));
  fill(x, random, -127, 127);
  for (size_t i = 0; i < bits; ++i) coefficients[i] = static_cast<std::int8_t>(1 << (bits - 1 - i));
  for (size_t n = 0; n < rows; ++n) {
    for (size_t g = 0; g < w.groups; ++g) offset[(n / 16 * w.groups + g) * 16 + n % 16] = w.offset[n * w.groups + g];
    for (size_t k = 0; k < columns; ++k)
      for (size_t i = 0; i < bits; ++i) {
        auto& byte = lines[((n / 16 * chunks + k / 32) * bits + i) * 64 + k % 32 / 8 * 16 + n % 16];
        byte = static_cast<std::uint8_t>(byte | (w.codes[n * columns + k] >> (bits - 1 - i) & 1) << k % 8);
      }
  }
  const LutWeight weight{lines.data(), coefficients.data(), offset.data(), scale.data(), bits, rows, columns, w.group, w.groups};
  linear_lut(weight, x.data(), x_scale.data(), tokens, {nullptr, integers.data()});
  linear_lut(weight, x.data(), x_scale.data(), tokens, {y.data(), nullptr});
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < rows; ++n) {
      long long all = 0;
      for (size_t g = 0; g < w.groups; ++g) {
        const auto want = w.product(n, g, [&](size_t k) { return x[t * columns + k]; });
        expect(integers[(t * rows + n) * w.groups + g] == want, "linear_lut", n, columns, bits);
        all += want;
      }
      expect(y[t * rows + n] == static_cast<float>(all), "linear_lut float", n, columns, bits);
    }
}

void check_all() {
  for (size_t columns : {1, 31, 33, 64, 129, 257, 513})
    for (size_t rows : {1, 5, 16, 35})
      for (size_t tokens : {1, 3}) {
        for (size_t bits : {1, 3, 8})
          for (size_t group : {size_t{64}, columns}) check_bits(bits, 9 - bits, rows, columns, group, tokens);
        for (size_t bits = 1; bits <= 4; ++bits)
          for (size_t group : {size_t{32}, columns}) check_lut(bits, rows, columns, group, tokens);
      }
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_all();
    std::printf("linear_bits and linear_lut on %s ok\n", isa.c_str());
  }
}
