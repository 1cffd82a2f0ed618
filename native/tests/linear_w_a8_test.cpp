// linear_w_a8 under sanitizers: tiles, activations and results of exactly the documented sizes, against plain integers.
#include "thread_pool.h"
#include "tiles.h"

using namespace anybit;

namespace {

void check(const Tiles& w, size_t tokens) {
  const size_t stride = activation_stride(w.columns);
  std::mt19937 random(static_cast<unsigned>(tokens));
  Exact<std::int8_t> codes(tokens * stride);
  Exact<float> x_scale(tokens * w.groups, 0.5f), x_sums(tokens * w.groups), y(tokens * w.rows);
  Exact<std::int32_t> sums(tokens * w.groups * w.rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < w.columns; ++k) {
      codes[t * stride + k] = static_cast<std::int8_t>(static_cast<int>(random() % 17) - 8);
      x_sums[t * w.groups + k / w.group] += codes[t * stride + k];
    }
  const Activations x{codes.data(), x_scale.data(), x_sums.data(), tokens, w.columns, stride, w.group, w.groups};
  linear_w_a8_sums(w.view(), x, sums.data());
  linear_w_a8(w.view(), x, y.data(), w.rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < w.rows; ++n) {
      double want = 0;
      for (size_t g = 0; g < w.groups; ++g) {
        long long sum = 0;
        for (size_t k = g * w.group; k < std::min(w.columns, (g + 1) * w.group); ++k)
          sum += static_cast<long long>(codes[t * stride + k]) * w.codes[n * w.columns + k];
        expect(sums[(t * w.groups + g) * w.rows + n] == sum, "integer sum", n, w.columns, w.bits);
        want += w.factor(n, g) * 0.5 * (static_cast<double>(sum) - w.zero_of(n, g) * static_cast<double>(x_sums[t * w.groups + g]));
      }
      expect(y[t * w.rows + n] == static_cast<float>(want), "linear_w_a8", n, w.columns, w.bits);
    }
}

void check_all() {
  size_t turn = 0;
  const size_t tokens[] = {1, 2, 3, 5, 16, 35, 83};
  for (size_t bits = 1; bits <= 8; ++bits)
    for (size_t columns : {1, 31, 33, 64, 65, 129, 257})
      for (size_t group : {size_t{32}, size_t{64}, columns})
        for (size_t rows : {1, 16, 35}) {
          const size_t zero_bytes[] = {0, 16, size_t{bits <= 4 ? 8u : 16u}};
          check(Tiles(bits, rows, columns, group, zero_bytes[turn % 3]), tokens[turn % 7]);
          turn += turn % 11 == 10 ? 2 : 1;  // so that zeros, tokens and shapes do not keep step
        }
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_all();
    std::printf("linear_w_a8 on %s ok\n", isa.c_str());
  }
}
