// What a Llama-like model is made of, as the decoder reads it; everything points into memory that Python keeps alive.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "embedding/cpu.h"
#include "hadamard/cpu.h"
#include "linear_side/cpu.h"

namespace anybit {

constexpr size_t kWidths = 8, kNoScheme = ~size_t{0};

// y = x W^T + bias, x after `rotation`. Layers that read the same input are one Linear of several parts: one part where the forms agree (their rows
// are then joined before tiling), one for each where they do not.
struct Linear {
  struct Part {
    std::array<TiledWeight, kWidths> views;  // [rows, columns] as read at 1..8 bits: one and the same unless the weight is nested
    size_t offset;                           // of its first row in y
    SideWeight side;                         // what else it multiplies: see `Scheme`
    size_t scheme = kNoScheme;               // of its input, an index of `schemes`; none: whatever is fastest

    Part(const TiledWeight& stored, size_t first) : offset(first) { views.fill(stored); }

    // Choosing a precision is choosing a view: no weight moves.
    const TiledWeight& at(std::int32_t bits) const { return views[std::clamp<std::int32_t>(bits, 1, kWidths) - 1]; }
  };
  std::vector<Part> parts;
  const float* bias = nullptr;  // [rows], or null
  size_t rows = 0, columns = 0;
  std::vector<Scheme> schemes;
  Rotation rotation;
};

// Rows of the embedding: affine planes as they are saved (usually a memory-mapped file), or float rows.
struct Embedding {
  enum class Kind : int { planes, float32, bfloat16, float16 };
  Kind kind = Kind::planes;
  Planes planes{};             // [vocabulary, hidden]
  Affine affine{};
  const void* rows = nullptr;  // [vocabulary, hidden] of the float kinds

  // What reading one row touches.
  size_t row_bytes(size_t hidden) const {
    if (kind != Kind::planes) return hidden * (kind == Kind::float32 ? 4 : 2);
    return planes.bits * planes.row_bytes() + affine.groups * (affine.zero ? 3 : 2);
  }
};

// Norms are null where a model has none; 1 + weight is stored for models that say so.
struct Layer {
  const float* input_norm = nullptr;           // [hidden], before attention
  const float* attention_out_norm = nullptr;   // [hidden], on what attention adds (Gemma)
  const float* mlp_norm = nullptr;             // [hidden], before the MLP
  const float* mlp_out_norm = nullptr;         // [hidden], on what the MLP adds (Gemma)
  const float* query_norm = nullptr;           // [head_dim], of each head (Qwen3, Gemma-3)
  const float* key_norm = nullptr;             // [head_dim]
  Linear qkv, output, gate_up, down;           // rows of qkv: queries, keys, values; of gate_up: gate, up
  size_t window = 0;                           // a token sees this many positions, itself included; 0: all
  size_t rope = 0;                             // which of the model's tables
};

// Rotary angles: position * inverse[i] turns channels i and i + pairs of a head; the other channels pass.
struct Rope {
  const float* inverse;  // [pairs]
  size_t pairs;
  float factor;          // on sine and cosine (yarn, longrope)
};

struct Model {
  size_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, intermediate = 0, vocabulary = 0;
  float epsilon = 0, embedding_scale = 1, attention_scale = 1, attention_softcap = 0, logit_softcap = 0;
  bool rotated_keys = false;                   // queries and keys get a Hadamard transform of head_dim, a power of 2, after RoPE
  bool gelu = false;                           // tanh-approximated GELU instead of SiLU
  const std::int32_t* precision = nullptr;     // [1], bits at which nested weights are read, shared with Python
  Embedding embedding;
  std::vector<Rope> ropes;
  std::vector<Layer> layers;
  const float* final_norm = nullptr;           // [hidden]
  Linear head;                                 // [vocabulary, hidden]
  const std::uint16_t* float_head = nullptr;   // bfloat16 [vocabulary, hidden] in place of `head`, or null

  size_t query_width() const { return heads * head_dim; }
  size_t kv_width() const { return kv_heads * head_dim; }
  size_t qkv_width() const { return query_width() + 2 * kv_width(); }
};

}  // namespace anybit
