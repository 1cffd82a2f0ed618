// What this processor can run, asked once.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace anybit {

// Ordered from the always available to the fastest; a kernel source is compiled once for each.
//
//   scalar  portable C++, also what arm64 runs (its compiler vectorizes it)
//   avx2    AVX2, FMA, F16C, BMI2
//   avx512  what Ice Lake and Zen 4 brought: F, BW, VL, DQ, VNNI, VBMI, VBMI2, BITALG, VPOPCNTDQ, GFNI
//   amx     avx512 with BF16, and the int8 and bf16 tile multipliers of Sapphire Rapids
enum class Isa { scalar, avx2, avx512, amx };

const char* name(Isa isa);

// Every feature kernels ask about, by its usual name; all false away from x86-64.
std::vector<std::pair<std::string, bool>> cpu_features();

// Empty when `isa` can run here, else the reason why not ("this CPU has no avx512bw").
std::string refusal(Isa isa);

}  // namespace anybit
