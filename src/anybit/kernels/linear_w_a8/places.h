// Where the two kept codes of a quad go, by the quad's four bits of a 2:4 mask: byte c is the place among the kept of column c, or
// 0x80 (a byte shuffle then gives 0). Two bits are set, so the lower three tell which: the entry of 1 is that of the mask 1001.
#pragma once

#include <cstdint>

namespace anybit {

constexpr std::int32_t place(unsigned mask) {
  std::uint32_t bytes = 0, kept = 0;
  for (unsigned c = 0; c < 4; ++c) bytes |= (mask >> c & 1 ? kept++ : 0x80u) << (8 * c);
  return static_cast<std::int32_t>(bytes);
}
constexpr std::int32_t kPlaces[8] = {place(0), place(9), place(10), place(3), place(12), place(5), place(6), place(0)};

}  // namespace anybit
