#include "cpu_features.h"

namespace anybit {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

// The compiler's run-time check also asks the operating system whether it saves the wide registers.
std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define ANYBIT_FEATURE(f) {f, __builtin_cpu_supports(f) != 0}
  return {ANYBIT_FEATURE("avx2"),       ANYBIT_FEATURE("fma"),        ANYBIT_FEATURE("f16c"),
          ANYBIT_FEATURE("bmi2"),       ANYBIT_FEATURE("avx512f"),    ANYBIT_FEATURE("avx512bw"),
          ANYBIT_FEATURE("avx512vl"),   ANYBIT_FEATURE("avx512dq"),   ANYBIT_FEATURE("avx512vnni"),
          ANYBIT_FEATURE("avx512vbmi"), ANYBIT_FEATURE("avx512bf16"), ANYBIT_FEATURE("avx512vpopcntdq")};
#undef ANYBIT_FEATURE
#else
  return {};
#endif
}

std::string refusal(Isa isa) {
  if (isa == Isa::scalar) return "";
#if defined(__x86_64__)
  std::vector<std::string> needed = {"avx2", "fma", "f16c", "bmi2"};
  if (isa == Isa::avx512) needed.insert(needed.end(), {"avx512f", "avx512bw", "avx512vl", "avx512dq"});
  const auto features = cpu_features();
  for (const auto& need : needed)
    for (const auto& [feature, present] : features)
      if (feature == need && !present) return "this CPU has no " + need;
  return "";
#else
  return "this build is not for x86-64";
#endif
}

}  // namespace anybit
