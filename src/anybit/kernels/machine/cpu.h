// What this machine can do at most, measured: the denominators of every "% of peak". op.py has the contract.
#pragma once

#include "targets.h"

namespace anybit {

struct MachineTable {
  // Reads `bytes` (a multiple of 256) once; returns something that depends on all of it.
  std::uint64_t (*read)(const std::uint8_t* data, size_t bytes);
  // `steps` rounds of independent u8 x s8 multiply-adds in registers; returns how many multiply-adds that were. `sink` gets a
  // value that depends on all of them. Null where the instruction set has none.
  double (*dot_int8)(size_t steps, std::int32_t* sink);
  double (*tiles_int8)(size_t steps, std::int32_t* sink);
  double (*tiles_bf16)(size_t steps, std::int32_t* sink);
};
ANYBIT_FOR_TARGETS(extern const MachineTable machine_table;)

// Seconds to read `bytes` with all threads, each its own contiguous part.
double seconds_to_read(const std::uint8_t* data, size_t bytes);

enum class Peak { dot_int8, tiles_int8, tiles_bf16 };

// Multiply-adds a second of all threads together, `steps` each; 0 where the instruction set in use has none.
double multiply_adds_per_second(Peak peak, size_t steps);

}  // namespace anybit
