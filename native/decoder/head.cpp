// The output end of a step: final norm of the rows that want it, logits, and the likeliest tokens.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "decoder/linear.h"
#include "linear_bf16/cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

// NaN comes first, so that a caller who looks at the best token sees it.
bool better(const Candidate& a, const Candidate& b) {
  if (std::isnan(a.value) || std::isnan(b.value)) return std::isnan(a.value) && (!std::isnan(b.value) || a.id < b.id);
  return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// Puts `next` into the sorted list best [k].
void insert(Candidate* best, size_t k, Candidate next) {
  if (!better(next, best[k - 1])) return;
  size_t at = k - 1;
  for (; at > 0 && better(next, best[at - 1]); --at) best[at] = best[at - 1];
  best[at] = next;
}

constexpr Candidate kNone = {-INFINITY, INT32_MAX};

// The best k of logits [count], whose ids begin at `first`.
void best_of(const float* logits, size_t count, size_t first, size_t k, Candidate* best) {
  std::fill_n(best, k, kNone);
  for (size_t i = 0; i < count; ++i)
    if (!(logits[i] < best[k - 1].value)) insert(best, k, {logits[i], static_cast<std::int32_t>(first + i)});
}

}  // namespace

void Decoder::check(const Batch& batch) const {
  const auto fail = [](const std::string& what) { throw std::invalid_argument(what); };
  size_t needed = 0;
  for (size_t slot = 0; slot < cache_.slots(); ++slot) {
    const auto rows = std::count(batch.slots, batch.slots + batch.rows, static_cast<std::int32_t>(slot));
    needed += cache_.pages_needed(slot, static_cast<size_t>(rows));
  }
  for (size_t t = 0; t < batch.rows; ++t) {
    if (batch.slots[t] < 0 || static_cast<size_t>(batch.slots[t]) >= cache_.slots())
      fail("slot " + std::to_string(batch.slots[t]) + " is not one of " + std::to_string(cache_.slots()));
    if (batch.tokens[t] < 0 || static_cast<size_t>(batch.tokens[t]) >= model_.vocabulary)
      fail("token " + std::to_string(batch.tokens[t]) + " is outside the vocabulary of " + std::to_string(model_.vocabulary));
  }
  if (needed > cache_.free_pages())
    fail("the key-value cache is full (" + std::to_string(cache_.free_pages() * kPageTokens) +
         " tokens left); raise max_tokens or reset a sequence");
}

// As many as fit, but of a sealing cache's slot only those of one page.
size_t Decoder::pass_rows(const Batch& batch, size_t first) {
  const size_t most = std::min(max_rows_, batch.rows - first);
  std::fill(taken_.begin(), taken_.end(), 0);
  for (size_t t = 0; t < most; ++t) {
    const auto slot = static_cast<size_t>(batch.slots[first + t]);
    if (taken_[slot] && cache_.turns(slot, taken_[slot])) return t;
    ++taken_[slot];
  }
  return most;
}

template <class Head>
void Decoder::run(const Batch& batch, size_t head_rows, Head&& head) {
  const OwnWorkers alone;
  check(batch);
  precision_ = *model_.precision, halves_ = batch.prompt && linear_w_bf16_runs();
  const auto norm = ANYBIT_ACTIVE(quantize_activations_table).rms_norm;
  size_t want = 0;
  for (size_t first = 0, rows; first < batch.rows; first += rows) {
    rows = pass_rows(batch, first);
    const size_t begin = want;
    const auto row = [&](size_t wanted) { return static_cast<size_t>(batch.wanted[wanted]) - first; };
    size_t kept = 0;
    for (; want < batch.wanted_rows && row(want) < rows; ++want)
      if (!kept || work_.kept[kept - 1] != row(want)) work_.kept[kept++] = row(want);
    pass(batch.tokens + first, batch.slots + first, rows, kept);
    for (size_t done = begin, at = 0, count; done < want; done += count) {
      count = std::min({head_rows, max_rows_, want - done});
      for (size_t i = 0; i < count; ++i) {
        at += row(done + i) != work_.kept[at];
        work_.source[i] = at;
      }
      each_row(count, model_.hidden, [&](size_t i) {
        norm(work_.hidden.data() + work_.source[i] * model_.hidden, {model_.final_norm, false, model_.epsilon},
             work_.normed.data() + i * model_.hidden, model_.hidden);
      });
      bits_ = precision_, read_ = &bytes_.head;
      if (model_.float_head) bytes_.head += model_.vocabulary * model_.hidden * sizeof(*model_.float_head);
      head(done, count);
    }
  }
}

void Decoder::logits(const Batch& batch, float* out) {
  const DecoderMath& math = ANYBIT_ACTIVE(decoder_math);
  run(batch, max_rows_, [&](size_t first, size_t count) {
    float* y = out + first * model_.vocabulary;
    if (model_.float_head) {
      linear_bf16(model_.float_head, work_.normed.data(), count, model_.vocabulary, model_.hidden, y);
    } else {
      linear(model_.head, count, false, y, work_.normed.data(), model_.hidden, [](size_t) {});
    }
    if (model_.logit_softcap > 0) math.softcap(y, model_.logit_softcap, count * model_.vocabulary);
  });
}

void Decoder::top(const Batch& batch, size_t k, float* values, std::int32_t* ids) {
  if (k < 1 || k > std::min(kMaxTop, model_.vocabulary))
    throw std::invalid_argument("k must be 1 to " + std::to_string(std::min(kMaxTop, model_.vocabulary)));
  run(batch, kTopRows, [&](size_t first, size_t count) { top_rows(count, k, values + first * k, ids + first * k); });
}

// A thread keeps the best of a block of logits while they are still in its cache; lists are merged in the order of blocks.
void Decoder::top_rows(size_t rows, size_t k, float* values, std::int32_t* ids) {
  const size_t vocabulary = model_.vocabulary, blocks = Workspace::top_blocks(model_);
  float* logits = work_.top_logits.data();
  TiledWeight weight{};
  Activations x{};
  if (model_.float_head) {
    linear_bf16(model_.float_head, work_.normed.data(), rows, vocabulary, model_.hidden, logits);
  } else {
    weight = model_.head.parts.front().at(bits_);
    bytes_.head += weight.bytes();
    x = activations(weight, rows);
    quantize_rows(work_.normed.data(), x, 0, rows);
  }
  auto body = [&](size_t begin, size_t end) noexcept {
    for (size_t block = begin; block < end; ++block) {
      const size_t first = block * kTopBlock * TiledWeight::kRows;
      const size_t count = std::min(kTopBlock * TiledWeight::kRows, vocabulary - first);
      if (weight.planes)
        linear_w_a8_blocks(weight, x, logits, vocabulary, block * kTopBlock,
                           std::min((block + 1) * kTopBlock, weight.row_blocks()));
      for (size_t t = 0; t < rows; ++t)
        best_of(logits + t * vocabulary + first, count, first, k, work_.candidates.data() + (t * blocks + block) * k);
    }
  };
  parallel_for(blocks, 1, body);
  for (size_t t = 0; t < rows; ++t) {
    Candidate best[kMaxTop];
    std::fill_n(best, k, kNone);
    const Candidate* from = work_.candidates.data() + t * blocks * k;
    for (size_t i = 0; i < blocks * k; ++i) insert(best, k, from[i]);
    for (size_t i = 0; i < k; ++i) values[t * k + i] = best[i].value, ids[t * k + i] = best[i].id;
  }
  if (model_.logit_softcap > 0) ANYBIT_ACTIVE(decoder_math).softcap(values, model_.logit_softcap, rows * k);
}

}  // namespace anybit
