#include "cpu.h"
#include "thread_pool.h"

namespace anybit {
namespace {

// body(token) for every token; shared out from about 32 Ki floats on, that is some 8 microseconds.
template <class F>
void for_tokens(size_t first, size_t last, size_t columns, F body) {
  if (first >= last) return;
  parallel_rows(last - first, 1, 8 * columns, [&](size_t begin, size_t end) noexcept {
    for (size_t t = first + begin; t < first + end; ++t) body(t);
  });
}

// Whether `quantize` makes what the scheme asks for: int8, symmetric, as it comes.
bool is_plain(const Scheme& s, size_t group) {
  return s.bits == 8 && s.symmetric && s.clip == 1.0f && !s.scale && !s.bypassed && s.group_size == group;
}

}  // namespace

void quantize_rows(const float* x, const Activations& out, size_t first, size_t last) {
  const QuantizeActivationsTable& k = ANYBIT_ACTIVE(quantize_activations_table);
  for_tokens(first, last, out.columns, [&](size_t t) { k.quantize(x + t * out.columns, out, t); });
}

void encode_rows(const float* x, const Scheme& scheme, const Activations& out, float* side, size_t first, size_t last) {
  const size_t width = scheme.side_width(out.columns);
  for_tokens(first, last, out.columns, [&](size_t t) { encode_row(x + t * out.columns, scheme, out, side + t * width, t); });
}

void encode_row(const float* x, const Scheme& scheme, const Activations& out, float* side, size_t token) {
  if (is_plain(scheme, out.group_size)) return ANYBIT_ACTIVE(quantize_activations_table).quantize(x, out, token);
  ANYBIT_ACTIVE(encode_table).encode(x, scheme, out, side, token);
}

void rms_norm_rows(const float* x, const float* weight, bool plus_one, float eps, float* y, size_t columns, size_t first,
                   size_t last) {
  const QuantizeActivationsTable& k = ANYBIT_ACTIVE(quantize_activations_table);
  const RmsNorm norm{weight, plus_one, eps};
  for_tokens(first, last, columns, [&](size_t t) { k.rms_norm(x + t * columns, norm, y + t * columns, columns); });
}

void gate_rows(const float* gate_up, Gate gate, float* y, size_t columns, size_t first, size_t last) {
  const QuantizeActivationsTable& k = ANYBIT_ACTIVE(quantize_activations_table);
  for_tokens(first, last, 2 * columns, [&](size_t t) { k.gate(gate_up + 2 * t * columns, gate, y + t * columns, columns); });
}

}  // namespace anybit
