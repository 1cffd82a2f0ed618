#include <nanobind/stl/vector.h>

#include <vector>

#include "bind.h"
#include "cpu.h"

namespace anybit {
namespace {

KvShape shape_from(const nb::tuple& t) {
  return {nb::cast<size_t>(t[0]), nb::cast<size_t>(t[1]), nb::cast<size_t>(t[2]),
          nb::cast<size_t>(t[3]), nb::cast<size_t>(t[4]), nb::cast<bool>(t[5])};
}

using Tables = std::vector<std::vector<size_t>>;

// Addresses of the pages of each sequence, bit 0 set in those of open ones, and where each token looks, int64 [tokens, 3]: sequence, first, last.
struct Looks {
  std::vector<std::uint8_t*> pages;
  std::vector<Query> queries;

  Looks(const Tables& tables, Address looks, size_t tokens) {
    std::vector<size_t> starts;
    for (const auto& table : tables) {
      starts.push_back(pages.size());
      for (size_t page : table) pages.push_back(at<std::uint8_t>(page));
    }
    const auto* row = at<const std::int64_t>(looks);
    for (size_t t = 0; t < tokens; ++t, row += 3)
      queries.push_back({pages.data() + starts[static_cast<size_t>(row[0])], static_cast<size_t>(row[1]),
                         static_cast<size_t>(row[2])});
  }
};

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("kv_page_bytes", [](const nb::tuple& shape) { return shape_from(shape).page_bytes(); }, "shape"_a);
  m.def(
      "kv_seal",
      [](const nb::tuple& shape, Address open, Address sealed) {
        kv_seal(shape_from(shape), at<const std::uint8_t>(open), at<std::uint8_t>(sealed));
      },
      "shape"_a, "open"_a, "sealed"_a);
  m.def(
      "kv_write",
      [](const nb::tuple& shape, const Tables& tables, Address looks, size_t tokens, Address keys,
         Address values) {
        const KvShape s = shape_from(shape);
        const Looks where(tables, looks, tokens);
        nb::gil_scoped_release unlocked;
        kv_write(s, where.queries.data(), tokens, at<const float>(keys), at<const float>(values));
      },
      "shape"_a, "tables"_a, "looks"_a, "tokens"_a, "keys"_a, "values"_a);
  m.def(
      "attend",
      [](const nb::tuple& shape, const Tables& tables, Address looks, size_t tokens, Address q, float scaling,
         float softcap, bool prompt, Address out) {
        const KvShape s = shape_from(shape);
        const Looks where(tables, looks, tokens);
        nb::gil_scoped_release unlocked;
        attend(s, {scaling, softcap, prompt}, at<const float>(q), where.queries.data(), tokens, at<float>(out));
      },
      "shape"_a, "tables"_a, "looks"_a, "tokens"_a, "q"_a, "scaling"_a, "softcap"_a, "prompt"_a, "out"_a);
}

}  // namespace anybit
