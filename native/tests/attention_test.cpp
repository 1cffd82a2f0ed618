// Attention under sanitizers: exact-size heap pages and outputs, unused slots poisoned, against plain double arithmetic.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "attention/cpu.h"
#include "exact.h"
#include "thread_pool.h"

using namespace anybit;

namespace {

// A sequence whose pages are separate allocations, written token by token.
struct Sequence {
  KvShape shape;
  size_t tokens;
  std::vector<float> keys, values, q;
  std::vector<std::vector<std::uint8_t>> pages;
  std::vector<std::uint8_t*> table;
  std::vector<Query> queries;

  Sequence(const KvShape& s, size_t count) : shape(s), tokens(count) {
    std::mt19937 random(static_cast<unsigned>(s.head_dim + count));
    std::normal_distribution<float> normal;
    keys.resize(tokens * s.kv_heads * s.head_dim), values.resize(keys.size()), q.resize(tokens * s.heads * s.head_dim);
    for (auto* x : {&keys, &values, &q})
      for (auto& v : *x) v = normal(random);
    pages.assign((tokens + kPageTokens - 1) / kPageTokens, std::vector<std::uint8_t>(s.page_bytes(), 0xFF));
    for (auto& page : pages) table.push_back(page.data());
    for (size_t t = 0; t < tokens; ++t) queries.push_back({table.data(), t > 90 ? t - 90 : 0, t});
  }

  // Token t, query head h, dim d, from the values as they were before they were stored.
  double want(size_t t, size_t h, size_t d) const {
    const size_t kv = h / shape.group(), dim = shape.head_dim;
    double sum = 0, out = 0;
    for (size_t p = queries[t].first; p <= t; ++p) {
      double score = 0;
      for (size_t i = 0; i < dim; ++i)
        score += static_cast<double>(q[(t * shape.heads + h) * dim + i]) * keys[(p * shape.kv_heads + kv) * dim + i];
      const double weight = std::exp(score * 0.1);
      sum += weight, out += weight * values[(p * shape.kv_heads + kv) * dim + d];
    }
    return out / sum;
  }
};

void check_attend(const Sequence& one, bool prompt) {
  const KvShape& shape = one.shape;
  Exact<float> q(one.q.size()), out(one.q.size());
  std::copy(one.q.begin(), one.q.end(), q.begin());
  attend(shape, {0.1f, 0.0f, prompt}, q.data(), one.queries.data(), one.tokens, out.data());
  // What storing may cost, and what bfloat16 may on top; float32 is far below.
  const double step = (shape.key_bits == 2 ? 3.0 : shape.key_bits == 4 ? 0.5 : shape.key_bits == 8 ? 0.03 : 0.01) + (prompt ? 0.02 : 0.0);
  for (size_t t = 0; t < one.tokens; t += 13)
    for (size_t h = 0; h < shape.heads; ++h) {
      const size_t d = (t + h) % shape.head_dim;
      expect(std::fabs(out[(t * shape.heads + h) * shape.head_dim + d] - one.want(t, h, d)) < step, "attend", t, h, d);
    }
}

void check(const KvShape& shape, size_t tokens) {
  Sequence one(shape, tokens), all(shape, tokens);
  const size_t width = shape.kv_heads * shape.head_dim;
  for (size_t t = 0; t < tokens; ++t)
    kv_write(shape, one.table[t / kPageTokens], t, one.keys.data() + t * width, one.values.data() + t * width);
  kv_write(shape, all.queries.data(), tokens, all.keys.data(), all.values.data());
  expect(one.pages == all.pages, "one write at a time", shape.key_bits, shape.head_dim, tokens);
  for (bool prompt : {false, true}) check_attend(one, prompt);
}

}  // namespace

int main() {
  set_threads(2);
  for (const auto& isa : available_isas()) {
    set_isa(isa);
    for (size_t bits : {16, 8, 4, 2})
      for (size_t tokens : {1, 33, 64, 150}) {
        check({4, 2, 16, bits, bits}, tokens);
        check({9, 1, 80, bits, bits}, tokens);
      }
    std::printf("attention on %s ok\n", isa.c_str());
  }
}
