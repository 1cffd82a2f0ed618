// How a kernel source that is compiled once per instruction set is declared and chosen.
//
// A kernel's cpu.cpp puts everything into `namespace anybit::ANYBIT_TARGET` and defines there one table of function pointers,
// declared in its cpu.h with ANYBIT_FOR_TARGETS; ANYBIT_ACTIVE(table) is the one of the instruction set in use.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace anybit {

using std::size_t;

// Headers are compiled for every target; a function that the linker could pick from the AVX-512 build would crash elsewhere.
#define ANYBIT_INLINE [[gnu::always_inline]] inline

#if defined(__x86_64__)
#define ANYBIT_FOR_TARGETS(declaration) \
  namespace scalar { declaration }      \
  namespace avx2 { declaration }        \
  namespace avx512 { declaration }      \
  namespace amx { declaration }
#define ANYBIT_ACTIVE(table) \
  (*::anybit::of_target(&::anybit::scalar::table, &::anybit::avx2::table, &::anybit::avx512::table, &::anybit::amx::table))
#else
#define ANYBIT_FOR_TARGETS(declaration) \
  namespace scalar { declaration }
#define ANYBIT_ACTIVE(table) (::anybit::scalar::table)
#endif

template <class T>
ANYBIT_INLINE T* of_target(T* scalar, T* avx2, T* avx512, T* amx) {
  switch (active_isa()) {
    case Isa::amx: return amx;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return scalar;
  }
}

}  // namespace anybit
