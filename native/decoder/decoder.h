// One forward step of a Llama-like model: rows of (token, sequence) in, logits or the likeliest tokens out.
//
// A prompt is many rows of one sequence, a decode step one row of each of many. Every row's result depends on its own sequence
// alone, bit for bit, so how rows are grouped into calls, or shared among threads, changes nothing. Inside a step nothing is
// allocated and Python is not called.
#pragma once

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
};

class Decoder {
 public:
  // max_rows: rows of one pass through the layers; a larger batch is cut.
  Decoder(const Model& model, const KvShape& shape, size_t tokens, size_t slots, size_t max_rows)
      : model_(model), cache_(shape, model.layers.size(), tokens, slots), max_rows_(max_rows), work_(model, max_rows) {}

  KvCache& cache() { return cache_; }

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
  void pass(const std::int32_t* tokens, const std::int32_t* slots, size_t rows);

  // Sublayers on the rows_ rows of the pass; each adds to the residual stream.
  void embed(const std::int32_t* tokens);
  void attention(const Layer& layer, size_t index);
  void mlp(const Layer& layer);

  // Queries after RoPE and where they look; keys and values into the cache.
  void place_heads(const Layer& layer, size_t index);
  void add_residual(const float* weight);
  // y [rows, linear.rows]; fill(activations) writes the input [rows, linear.columns] as codes.
  template <class Fill>
  void linear(const Linear& linear, size_t rows, float* y, Fill&& fill);
  Activations activations(const TiledWeight& weight, size_t rows);
  void top_rows(size_t rows, size_t k, float* values, std::int32_t* ids);
  template <class Body>
  void each_row(size_t width, Body&& body);

  Model model_;
  KvCache cache_;
  size_t max_rows_, rows_ = 0;  // rows_: of the pass under way
  std::int32_t bits_ = 0;       // precision of the step under way
  Workspace work_;
};

}  // namespace anybit
