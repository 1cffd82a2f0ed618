// What every kernel's bind.cpp needs: raw addresses in, nothing out; op.py checks shapes, dtypes and contiguity first.
//
// Addresses instead of array objects: exchanging one torch tensor costs about 2 microseconds, a decode step makes hundreds.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace anybit {

namespace nb = nanobind;
using namespace nb::literals;

using Address = std::uintptr_t;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;  // other Python threads run while a kernel does

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace anybit
