// One forward step of a Llama-like model: rows of (token, sequence) in, logits or the likeliest tokens out.
//
// A prompt is many rows of one sequence, a decode step one row of each of many. Every row's result depends on its own sequence
// alone, bit for bit, so how rows are grouped into calls, or shared among threads, changes nothing. Inside a step nothing is
// allocated and Python is not called.
#pragma once

#include <utility>

#include "decoder/cache.h"
#include "decoder/model.h"
#include "decoder/workspace.h"

namespace anybit {

struct Batch {
  const std::int32_t* tokens;  // [rows], 0 <= token < vocabulary
  const std::int32_t* slots;   // [rows]; each row is the next position of its slot
  size_t rows;
  const std::int32_t* wanted;  // [wanted_rows], ascending: the rows that want output
  size_t wanted_rows;
  bool prompt;  // rows of a prompt: where there is a matrix unit, activations are bfloat16 instead of bytes, whatever their number
};

// Bytes of weights handed to kernels: the planes in use with their padding and tables.
struct WeightBytes {
  size_t layers = 0, head = 0, embedding = 0;
};

class Decoder {
 public:
  // max_rows: rows of one pass through the layers; a larger batch is cut.
  Decoder(const Model& model, const KvShape& shape, const KvPolicy& policy, size_t tokens, size_t slots, size_t max_rows)
      : model_(model),
        cache_(shape, policy, model.layers.size(), tokens, slots),
        max_rows_(max_rows),
        taken_(slots),
        offsets_(model.layers.size()),
        work_(model, max_rows) {}

  KvCache& cache() { return cache_; }

  // Bits that each layer adds to the model's precision from the next step on, [layers].
  void set_offsets(const std::int32_t* offsets) { std::copy_n(offsets, offsets_.size(), offsets_.data()); }

  // Since the last call.
  WeightBytes weight_bytes() { return std::exchange(bytes_, {}); }

  // Logits float32 [wanted_rows, vocabulary].
  // Throws std::invalid_argument, before anything is changed: an id or slot out of range, or too few free pages.
  void logits(const Batch& batch, float* out);

  // The k <= kMaxTop likeliest tokens of each wanted row, best first, equal ones by id: values and ids [wanted_rows, k].
  void top(const Batch& batch, size_t k, float* values, std::int32_t* ids);

 private:
  void check(const Batch& batch) const;
  // Runs all rows, pass by pass; head(first, count) follows for the wanted rows [first, first + count) whose final norm lies in
  // work_.normed [count, hidden].
  template <class Head>
  void run(const Batch& batch, size_t head_rows, Head&& head);
  // Rows of the next pass.
  size_t pass_rows(const Batch& batch, size_t first);
  // All rows into the cache; the residual stream of rows work_.kept [kept], ascending, into the first rows of work_.hidden.
  void pass(const std::int32_t* tokens, const std::int32_t* slots, size_t rows, size_t kept);

  // On the rows_ rows of the pass.
  void embed(const std::int32_t* tokens);
  // Queries after RoPE and where they look; keys and values into the cache.
  void keys_and_queries(const Layer& layer, size_t index);
  void place_head(const Layer& layer, size_t t, size_t kv_head);
  void keep(size_t kept);
  // These leave what they add in work_.added; whoever reads the residual stream next settles that first.
  void attention(const Layer& layer);
  void mlp(const Layer& layer);
  void settle(size_t t);
  // y from the RMSNorm of the residual stream.
  void stream_into(const Linear& to, const float* weight, float* y);
  // y [rows, linear.rows] of the rows that make(t) leaves at input + t * stride, where they are rotated: quantized by the scheme of
  // a part, else as bfloat16 with `halves` and as bytes without.
  template <class Make>
  void linear(const Linear& linear, size_t rows, bool halves, float* y, float* input, size_t stride, Make&& make);
  Activations activations(const TiledWeight& weight, size_t rows);
  void top_rows(size_t rows, size_t k, float* values, std::int32_t* ids);
  Model model_;
  KvCache cache_;
  size_t max_rows_, rows_ = 0;  // rows_: of the pass under way
  size_t runs_ = 0;             // of rows in one page, work_.run [runs_ + 1]
  bool pending_ = false;        // work_.added, after added_norm_ where there is one, is still to be added
  const float* added_norm_ = nullptr;
  std::vector<size_t> taken_;   // rows of each slot in the pass to come
  std::vector<std::int32_t> offsets_;
  std::int32_t precision_ = 0;  // of the step under way
  std::int32_t bits_ = 0;       // of the layer under way: the step's and the layer's offset
  WeightBytes bytes_;
  size_t* read_ = nullptr;      // which of bytes_ the linear under way counts in
  bool halves_ = false;         // whether its activations are bfloat16
  Workspace work_;
};

}  // namespace anybit
