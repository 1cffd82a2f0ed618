// The memory of a step, allocated once: every array is [max_rows, ...] of one pass through the layers.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "attention/cpu.h"
#include "decoder/model.h"
#include "linear_w_bf16/cpu.h"

namespace anybit {

// A 64-byte aligned array, not initialized: what a short prompt never touches never becomes resident.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t{64}))) {}
  ~Buffer() { operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
};

struct Candidate {
  float value;
  std::int32_t id;
};

constexpr size_t kMaxTop = 64;            // likeliest tokens a row can ask for
constexpr size_t kTopRows = 16;           // rows the fused head takes at a time
constexpr size_t kTopBlock = 64;          // in blocks of 16 vocabulary rows: what one candidate list covers

struct Workspace {
  Workspace(const Model& model, size_t max_rows)
      : slot(max_rows),
        position(max_rows),
        run(max_rows + 1),
        kept(max_rows),
        source(max_rows),
        hidden(max_rows * model.hidden),
        normed(max_rows * model.hidden),
        added(max_rows * model.hidden),
        qkv(max_rows * model.qkv_width()),
        query(max_rows * model.query_width()),
        mixed(max_rows * model.query_width()),
        gate_up(max_rows * 2 * model.intermediate),
        cosine(max_rows * model.ropes.size() * most_pairs(model)),
        sine(max_rows * model.ropes.size() * most_pairs(model)),
        queries(max_rows),
        codes(max_rows * activation_stride(widest_input(model))),
        halves(max_rows * half_stride(widest_input(model))),
        scale(max_rows * most_groups(model)),
        sums(max_rows * most_groups(model)),
        side(max_rows * widest_side(model)),
        top_logits(kTopRows * model.vocabulary),
        candidates(kTopRows * top_blocks(model) * kMaxTop) {}

  Buffer<std::uint32_t> slot, position;
  Buffer<size_t> run;             // first rows of what goes into one page, then the number of rows
  Buffer<size_t> kept;            // rows whose output is wanted
  Buffer<size_t> source;          // which of them each row of `normed` comes from
  Buffer<float> hidden;           // [hidden], the residual stream
  Buffer<float> normed;           // [hidden], rows that want output after the final norm
  Buffer<float> added;            // [hidden], what a sublayer adds
  Buffer<float> qkv;              // [heads + 2 kv_heads, head_dim]
  Buffer<float> query, mixed;     // [heads, head_dim], queries after RoPE and what attention makes of them
  Buffer<float> gate_up;          // [2 intermediate]
  Buffer<float> cosine, sine;     // [ropes, pairs]
  Buffer<Query> queries;
  Buffer<std::int8_t> codes;      // the activations of the linear under way
  Buffer<std::uint16_t> halves;   // the same as bfloat16, in prompts
  Buffer<float> scale, sums;      // [groups]
  Buffer<float> side;             // what a scheme keeps in float
  Buffer<float> top_logits;       // [kTopRows, vocabulary]
  Buffer<Candidate> candidates;   // [kTopRows, top_blocks, kMaxTop]

  static size_t most_pairs(const Model& model) {
    size_t pairs = 0;
    for (const Rope& rope : model.ropes) pairs = std::max(pairs, rope.pairs);
    return pairs;
  }

  static size_t top_blocks(const Model& model) {
    constexpr size_t rows = kTopBlock * TiledWeight::kRows;
    return (model.vocabulary + rows - 1) / rows;
  }

 private:
  static size_t widest_input(const Model& model) { return std::max({model.hidden, model.query_width(), model.intermediate}); }

  template <class Look>
  static void each_linear(const Model& model, Look&& look) {
    for (const Layer& layer : model.layers)
      for (const Linear* linear : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) look(*linear);
    look(model.head);
  }

  static size_t most_groups(const Model& model) {
    size_t groups = 1;
    each_linear(model, [&](const Linear& linear) {
      for (const auto& part : linear.parts) groups = std::max(groups, part.views.back().groups);
    });
    return groups;
  }

  static size_t widest_side(const Model& model) {
    size_t width = 1;
    each_linear(model, [&](const Linear& linear) {
      for (const Scheme& scheme : linear.schemes) width = std::max(width, scheme.side_width(linear.columns));
    });
    return width;
  }
};

}  // namespace anybit
