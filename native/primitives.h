// The few operations that differ between instruction sets. Kernel sources are written once over these.
//
//   kCodes                 columns that one expand / collapse handles (8, 32 or 64)
//   expand(bits, c, w)     c[i] |= w where bit i is set                      bits: kCodes / 8 bytes, c: kCodes bytes
//   collapse(c, w, bits)   bit i = (c[i] & w) != 0                           w a power of two
//   kLanes                 rows (float lanes) that one lookup handles (1, 8 or 16)
//   Words, Floats          kLanes unsigned 32-bit integers, kLanes floats
//   load_words(p, s)       lane i = the 4 bytes at p + i * s
//   load_strided(p, s)     lane i = p[i * s], floats
//   lookup(table, w)       lane i = table[w[i] % 16]
//   shift4(w)              w >> 4
//   fma(a, b, c)           a * b + c, one rounding
//   store(y, v, n)         the first n lanes
//   half(h)                one float16 to a float
//   halves(h, f, n)        n float16 to floats
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "targets.h"

static_assert(std::endian::native == std::endian::little, "planes are little-endian");

#if defined(ANYBIT_TARGET_avx512) || defined(ANYBIT_TARGET_amx)
#include "primitives_avx512.h"
#elif defined(ANYBIT_TARGET_avx2)
#include "primitives_avx2.h"
#else
#include "primitives_scalar.h"
#endif
