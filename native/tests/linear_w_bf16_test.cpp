// linear_w_bf16 under sanitizers: operands of exactly the documented sizes, against plain integers: weights of at most 8 bits and
// small activations are exact in bfloat16, and so are their sums in float32.
#include "linear_w_bf16/cpu.h"
#include "thread_pool.h"
#include "tiles.h"

using namespace anybit;

namespace {

void check(const Tiles& w, size_t tokens) {
  const size_t stride = half_stride(w.columns);
  std::mt19937 random(static_cast<unsigned>(tokens));
  Exact<float> x(tokens * w.columns), y(tokens * w.rows, -1.0f);
  Exact<std::uint16_t> halves(tokens * stride, 0x7FC0);  // NaN wherever nobody writes
  for (auto& v : x) v = static_cast<float>(static_cast<int>(random() % 17) - 8);
  const HalfActivations rounded{halves.data(), tokens, w.columns, stride};
  round_to_bf16(x.data(), rounded);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t k = 0; k < (w.columns + 31) / 32 * 32; ++k) {
      const float value = k < w.columns ? x[t * w.columns + k] : 0.0f;
      expect(std::bit_cast<float>(std::uint32_t{halves[t * stride + k]} << 16) == value, "round_to_bf16", t, k, w.columns);
    }
  if (!linear_w_bf16_runs()) return;
  linear_w_bf16(w.view(), rounded, y.data(), w.rows);
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < w.rows; ++n) {
      double want = 0;
      for (size_t k = 0; k < w.columns; ++k)
        want += w.factor(n, k / w.group) * (w.codes[n * w.columns + k] - w.zero_of(n, k / w.group)) * x[t * w.columns + k];
      expect(y[t * w.rows + n] == static_cast<float>(want), "linear_w_bf16", n, w.columns, w.bits);
    }
}

void check_all() {
  size_t turn = 0;
  const size_t tokens[] = {1, 2, 16, 17, 35, 83};
  for (size_t bits = 1; bits <= 8; ++bits)
    for (size_t columns : {1, 33, 64, 257, 500, 672})  // one panel, two, and more than are cut into panels
      for (size_t group : {size_t{32}, columns})
        for (size_t rows : {1, 16, 35, 48}) {
          const size_t zero_bytes[] = {0, 16, size_t{bits <= 4 ? 8u : 16u}};
          check(Tiles(bits, rows, columns, group, zero_bytes[turn % 3]), tokens[turn % 6]);
          turn += turn % 13 == 12 ? 2 : 1;  // so that zeros, tokens and shapes do not keep step
        }
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    check_all();
    std::printf("linear_w_bf16 %s on %s ok\n", linear_w_bf16_runs() ? "itself" : "rounding", isa.c_str());
  }
}
