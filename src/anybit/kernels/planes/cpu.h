// Codes uint8 [N, K] <-> planes; op.py has the contract.
#pragma once

#include "planes.h"

namespace anybit {

struct PlanesTable {
  void (*pack_rows)(const std::uint8_t* codes, std::uint8_t* planes, const Planes& shape, size_t begin, size_t end);
  void (*unpack_rows)(const Planes& planes, std::uint8_t* codes, size_t begin, size_t end);
};
ANYBIT_FOR_TARGETS(extern const PlanesTable planes_table;)

void pack_planes(const std::uint8_t* codes, std::uint8_t* planes, size_t bits, size_t rows, size_t columns);
void unpack_planes(const Planes& planes, std::uint8_t* codes);

}  // namespace anybit
