#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

Schedule schedule_of(const std::int32_t* weight, size_t p, const std::int32_t* token, size_t q) {
  struct Product { std::int32_t coefficient; Schedule::Pair pair; };
  std::vector<Product> products;
  for (size_t i = 0; i < p; ++i)
    for (size_t j = 0; j < q; ++j)
      products.push_back({weight[i] * token[j], {static_cast<std::uint8_t>(i), static_cast<std::uint8_t>(j)}});
  std::stable_sort(products.begin(), products.end(), [](auto& a, auto& b) { return a.coefficient < b.coefficient; });
  Schedule out{};
  for (size_t at = 0; at < products.size(); ++at) {
    if (at == 0 || products[at].coefficient != products[at - 1].coefficient) ++out.count;
    out.pairs[at] = products[at].pair;
    out.segments[out.count - 1] = {products[at].coefficient, static_cast<std::uint32_t>(at + 1)};
  }
  return out;
}

}  // namespace

bool linear_bits(const BitWeight& w, const std::int32_t* coefficients, const BitCodes& x, const BitResults& results) {
  const LinearBitsTable& k = ANYBIT_ACTIVE(linear_bits_table);
  // The caller's planes are read by every worker; each worker has its own scratch. Both keep their memory between calls.
  static thread_local std::vector<std::uint64_t> words;
  static thread_local std::vector<std::int32_t> sums;
  const size_t token_words = x.planes * w.bits.stride;
  words.resize(x.tokens * token_words);
  sums.resize(x.tokens * w.groups);
  std::uint64_t* const packed = words.data();  // named here: inside the task, `words` would be the worker's own
  std::int32_t* const packed_sums = sums.data();
  std::atomic<bool> fits{true};
  parallel_rows(x.tokens, 1, 8 * w.columns, [&](size_t begin, size_t end) noexcept {
    for (size_t t = begin; t < end; ++t)
      if (!k.pack_token(x.codes + t * w.columns, x.is_signed, w, x.coefficients, x.planes, packed + t * token_words,
                        packed_sums + t * w.groups))
        fits = false;
  });
  if (!fits) return false;
  const Schedule schedule = schedule_of(coefficients, w.bits.planes, x.coefficients, x.planes);
  const BitTokens tokens{{packed, x.planes, w.bits.stride}, packed_sums, x.scale, x.offset, x.tokens};
  const size_t work = w.bits.planes * w.columns * std::max<size_t>(1, x.planes * x.tokens / 8);
  parallel_rows(w.rows, k.row_block, work, [&](size_t begin, size_t end) noexcept {
    static thread_local std::vector<std::int64_t> scratch;
    scratch.resize(scratch_sums(w.groups));
    k.linear_rows(w, tokens, schedule, scratch.data(), results, begin, end);
  });
  return true;
}

}  // namespace anybit
