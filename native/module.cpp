// The Python module anybit._native: each kernel folder binds its own functions.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace anybit {

#define ANYBIT_KERNEL(name) void bind_##name(nb::module_&);
#include "kernels.inc"
#undef ANYBIT_KERNEL

namespace {

nb::dict features() {
  nb::dict out;
  for (const auto& [feature, present] : cpu_features()) out[feature.c_str()] = present;
  return out;
}

}  // namespace
}  // namespace anybit

NB_MODULE(_native, m) {
  using namespace anybit;
  m.def("isa", [] { return std::string(name(active_isa())); });
  m.def("set_isa", &set_isa, "isa"_a);
  m.def("available_isas", &available_isas);
  m.def("cpu_features", &features);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a, Unlocked());
#define ANYBIT_KERNEL(name) bind_##name(m);
#include "kernels.inc"
#undef ANYBIT_KERNEL
}
