// Loops that the compiler makes vectors of.
#include "halves.h"

#include <cstring>

namespace anybit::ANYBIT_TARGET {
namespace {

void widen(const std::uint16_t* x, float* y, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x[i]) << 16;
    std::memcpy(y + i, &bits, sizeof bits);
  }
}

void narrow(const float* x, std::uint16_t* y, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    const std::uint32_t even = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    y[i] = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : even);  // NaN stays NaN
  }
}

}  // namespace

extern const HalvesTable halves_table = {widen, narrow};

}  // namespace anybit::ANYBIT_TARGET
