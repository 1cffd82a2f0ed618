// The Python module anybit._native: raw addresses in, nothing out; the op.py files check shapes, dtypes and contiguity first.
//
// Addresses instead of array objects: exchanging one torch tensor costs about 2 microseconds, a decode step makes 1000 of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "ops.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

anybit::Planes planes_at(Address planes, size_t bits, size_t rows, size_t columns) {
  return {at<const std::uint8_t>(planes), bits, rows, columns};
}

anybit::Affine affine_at(Address scale, Address zero, size_t group_size, size_t columns) {
  return {at<const std::uint16_t>(scale), at<const std::uint8_t>(zero), group_size, (columns + group_size - 1) / group_size};
}

void pack(Address codes, Address planes, size_t bits, size_t rows, size_t columns) {
  anybit::pack_planes(at<const std::uint8_t>(codes), at<std::uint8_t>(planes), bits, rows, columns);
}

void unpack(Address planes, Address codes, size_t bits, size_t rows, size_t columns) {
  anybit::unpack_planes(planes_at(planes, bits, rows, columns), at<std::uint8_t>(codes));
}

void decode(Address planes, Address scale, Address zero, Address values, size_t bits, size_t rows, size_t columns, size_t group,
            size_t begin, size_t end) {
  anybit::decode_affine(planes_at(planes, bits, rows, columns), affine_at(scale, zero, group, columns), at<float>(values), begin,
                        end);
}

void linear(Address x, Address planes, Address scale, Address zero, Address y, size_t tokens, size_t bits, size_t rows,
            size_t columns, size_t group) {
  anybit::linear_a16(planes_at(planes, bits, rows, columns), affine_at(scale, zero, group, columns), at<const float>(x), tokens,
                     at<float>(y));
}

nb::dict features() {
  nb::dict out;
  for (const auto& [feature, present] : anybit::cpu_features()) out[feature.c_str()] = present;
  return out;
}

}  // namespace

NB_MODULE(_native, m) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  m.def("isa", [] { return std::string(anybit::name(anybit::active_isa())); });
  m.def("set_isa", &anybit::set_isa, "isa"_a);
  m.def("available_isas", &anybit::available_isas);
  m.def("cpu_features", &features);
  m.def("threads", &anybit::threads);
  m.def("set_threads", &anybit::set_threads, "count"_a, unlocked);
  m.def("pack_planes", &pack, "codes"_a, "planes"_a, "bits"_a, "rows"_a, "columns"_a, unlocked);
  m.def("unpack_planes", &unpack, "planes"_a, "codes"_a, "bits"_a, "rows"_a, "columns"_a, unlocked);
  m.def("decode_affine", &decode, "planes"_a, "scale"_a, "zero"_a, "values"_a, "bits"_a, "rows"_a, "columns"_a, "group_size"_a,
        "begin"_a, "end"_a, unlocked);
  m.def("linear_a16", &linear, "x"_a, "planes"_a, "scale"_a, "zero"_a, "y"_a, "tokens"_a, "bits"_a, "rows"_a, "columns"_a,
        "group_size"_a, unlocked);
}
