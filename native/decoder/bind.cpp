// The decoder for Python (anybit/engine): structures are filled in once, then every step is one call with raw addresses.
#include <memory>

#include "bind.h"
#include "decoder/decoder.h"
#include "linear_w_a8/weight_at.h"
#include "quantize_activations/scheme.h"

namespace anybit {
namespace {

void add_part(Linear& linear, Address planes, Address scale, Address zero, nb::tuple sizes, nb::tuple scalars, size_t offset,
              Address grain, Address mask) {
  const TiledWeight w = weight_at(planes, scale, zero, sizes, scalars, grain, mask);
  linear.parts.push_back({w, offset});
  linear.rows = offset + w.rows, linear.columns = w.columns;
}

// How the last part is read at `bits`: its first sizes[0] planes under tables of their own.
void set_view(Linear& linear, size_t bits, Address scale, Address zero, nb::tuple sizes, nb::tuple scalars) {
  TiledWeight& w = linear.parts.back().views.at(bits - 1);
  w.scale = at<const std::uint16_t>(scale), w.zero = at<const std::uint8_t>(zero), w.bits = nb::cast<size_t>(sizes[0]);
  w.scale_mul = nb::cast<float>(scalars[0]), w.zero_mul = nb::cast<float>(scalars[1]), w.zero_add = nb::cast<float>(scalars[2]);
}

// Quantizes the input of the last part by a scheme of its own, or by the one before's.
void set_scheme(Linear& linear, nb::object facts, Address scale, Address offset, Address bypass, size_t bypassed) {
  if (!facts.is_none()) linear.schemes.push_back(scheme_at(nb::cast<nb::tuple>(facts), scale, offset, bypass, bypassed));
  linear.parts.back().scheme = linear.schemes.size() - 1;
}

void set_side(Linear& linear, Address sums, size_t groups, Address columns, size_t width) {
  Linear::Part& part = linear.parts.back();
  part.side = {at<const float>(sums), at<const std::uint16_t>(columns), groups, width, part.views.back().rows};
}

void set_norms(Layer& layer, Address input, Address attention_out, Address mlp, Address mlp_out, Address query, Address key) {
  layer.input_norm = at<const float>(input), layer.attention_out_norm = at<const float>(attention_out);
  layer.mlp_norm = at<const float>(mlp), layer.mlp_out_norm = at<const float>(mlp_out);
  layer.query_norm = at<const float>(query), layer.key_norm = at<const float>(key);
}

void bind_structures(nb::module_& m) {
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<>())
      .def("add_part", &add_part, "planes"_a, "scale"_a, "zero"_a, "sizes"_a, "scalars"_a, "offset"_a,
           "grain"_a = 0, "mask"_a = 0)
      .def("set_scheme", &set_scheme, "facts"_a.none(), "scale"_a, "offset"_a, "bypass"_a, "bypassed"_a)
      .def("set_side", &set_side, "sums"_a, "groups"_a, "columns"_a, "width"_a)
      .def("set_rotation", [](Linear& l, Address factor, size_t order,
                              size_t power) { l.rotation = {at<const float>(factor), order, power}; })
      .def("set_view", &set_view, "bits"_a, "scale"_a, "zero"_a, "sizes"_a, "scalars"_a)
      .def("set_bias", [](Linear& l, Address bias) { l.bias = at<const float>(bias); });
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>())
      .def_rw("qkv", &Layer::qkv)
      .def_rw("output", &Layer::output)
      .def_rw("gate_up", &Layer::gate_up)
      .def_rw("down", &Layer::down)
      .def_rw("window", &Layer::window)
      .def_rw("rope", &Layer::rope)
      .def("set_norms", &set_norms, "input"_a, "attention_out"_a, "mlp"_a, "mlp_out"_a, "query"_a, "key"_a);
  nb::class_<Model>(m, "Model")
      .def(nb::init<>())
      .def_rw("hidden", &Model::hidden)
      .def_rw("heads", &Model::heads)
      .def_rw("kv_heads", &Model::kv_heads)
      .def_rw("head_dim", &Model::head_dim)
      .def_rw("intermediate", &Model::intermediate)
      .def_rw("vocabulary", &Model::vocabulary)
      .def_rw("epsilon", &Model::epsilon)
      .def_rw("embedding_scale", &Model::embedding_scale)
      .def_rw("attention_scale", &Model::attention_scale)
      .def_rw("attention_softcap", &Model::attention_softcap)
      .def_rw("logit_softcap", &Model::logit_softcap)
      .def_rw("rotated_keys", &Model::rotated_keys)
      .def_rw("gelu", &Model::gelu)
      .def_rw("head", &Model::head)
      .def("set_precision", [](Model& model, Address cell) { model.precision = at<const std::int32_t>(cell); })
      .def("set_final_norm", [](Model& model, Address weight) { model.final_norm = at<const float>(weight); })
      .def("set_float_head", [](Model& model, Address rows) { model.float_head = at<const std::uint16_t>(rows); })
      .def("set_embedding_planes",
           [](Model& model, Address planes, Address scale, Address zero, size_t bits, size_t group_size) {
             model.embedding.planes = {at<const std::uint8_t>(planes), bits, model.vocabulary, model.hidden};
             model.embedding.affine = {at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), group_size,
                                       (model.hidden + group_size - 1) / group_size};
           })
      .def("set_embedding_rows",
           [](Model& model, Address rows, int kind) {
             model.embedding.rows = at<const void>(rows), model.embedding.kind = static_cast<Embedding::Kind>(kind);
           })
      .def("add_rope", [](Model& model, Address inverse, size_t pairs,
                          float factor) { model.ropes.push_back({at<const float>(inverse), pairs, factor}); })
      .def("add_layer", [](Model& model, const Layer& layer) { model.layers.push_back(layer); });
}

Batch batch_at(Address tokens, Address slots, size_t rows, Address wanted, size_t wanted_rows, bool prompt) {
  return {at<const std::int32_t>(tokens), at<const std::int32_t>(slots), rows, at<const std::int32_t>(wanted), wanted_rows, prompt};
}

}  // namespace

void bind_decoder(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("decoder");
  bind_structures(m);
  m.attr("MAX_TOP") = kMaxTop;
  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* self, const Model& model, nb::tuple kv, size_t tokens, size_t slots, size_t max_rows) {
             const KvShape shape = {model.heads, model.kv_heads, model.head_dim, nb::cast<size_t>(kv[0]), nb::cast<size_t>(kv[1]),
                                    nb::cast<bool>(kv[2])};
             const KvPolicy policy = {nb::cast<bool>(kv[3]), nb::cast<size_t>(kv[4]), nb::cast<size_t>(kv[5])};
             new (self) Decoder(model, shape, policy, tokens, slots, max_rows);
           },
           "model"_a, "kv"_a, "tokens"_a, "slots"_a, "max_rows"_a)
      .def("slots", [](Decoder& d) { return d.cache().slots(); })
      .def("length", [](Decoder& d, size_t slot) { return d.cache().length(slot); })
      .def("truncate", [](Decoder& d, size_t slot, size_t length) { d.cache().truncate(slot, length); })
      .def("attach",
           [](Decoder& d, size_t slot, Address pages, size_t count) { d.cache().attach(slot, at<const std::uint32_t>(pages), count); })
      .def("hold", [](Decoder& d, size_t slot, size_t index) { return d.cache().hold(slot, index); })
      .def("release", [](Decoder& d, std::uint32_t page) { d.cache().release(page); })
      .def("set_offsets", [](Decoder& d, Address offsets) { d.set_offsets(at<const std::int32_t>(offsets)); })
      .def("weight_bytes",
           [](Decoder& d) {
             const WeightBytes bytes = d.weight_bytes();
             return nb::make_tuple(bytes.layers, bytes.head, bytes.embedding);
           })
      .def("read_cache", [](Decoder& d, size_t layer, size_t slot, Address keys,
                            Address values) { d.cache().read(layer, slot, at<float>(keys), at<float>(values)); })
      .def("free_tokens", [](Decoder& d) { return d.cache().free_pages() * kPageTokens; })
      .def("logits",
           [](Decoder& d, Address tokens, Address slots, size_t rows, Address wanted, size_t wanted_rows, bool prompt,
              Address out) {
             d.logits(batch_at(tokens, slots, rows, wanted, wanted_rows, prompt), at<float>(out));
           },
           Unlocked())
      .def("top",
           [](Decoder& d, Address tokens, Address slots, size_t rows, Address wanted, size_t wanted_rows, bool prompt,
              size_t k, Address values, Address ids) {
             d.top(batch_at(tokens, slots, rows, wanted, wanted_rows, prompt), k, at<float>(values), at<std::int32_t>(ids));
           },
           Unlocked());
}

}  // namespace anybit
