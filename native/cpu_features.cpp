#include "cpu_features.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace anybit {
namespace {

#if defined(__x86_64__)
// The tile registers are 8 KiB of state per thread; Linux hands them out on request, once per process.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "scalar";
  }
}

// The compiler's run-time check also asks the operating system whether it saves the wide registers.
std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // cpuid leaf 7, edx bits 22, 24, 25: gcc 12 does not know these names in __builtin_cpu_supports
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  static const bool tiles = (edx >> 24 & 1) && tiles_granted();
#define ANYBIT_FEATURE(f) {f, __builtin_cpu_supports(f) != 0}
  return {ANYBIT_FEATURE("avx2"),        ANYBIT_FEATURE("fma"),
          ANYBIT_FEATURE("f16c"),        ANYBIT_FEATURE("bmi2"),
          ANYBIT_FEATURE("avx512f"),     ANYBIT_FEATURE("avx512bw"),
          ANYBIT_FEATURE("avx512vl"),    ANYBIT_FEATURE("avx512dq"),
          ANYBIT_FEATURE("avx512vnni"),  ANYBIT_FEATURE("avx512vbmi"),
          ANYBIT_FEATURE("avx512vbmi2"), ANYBIT_FEATURE("avx512bitalg"),
          ANYBIT_FEATURE("gfni"),        ANYBIT_FEATURE("avx512vpopcntdq"),
          ANYBIT_FEATURE("avx512bf16"),  {"amx-tile", tiles},
          {"amx-int8", tiles && (edx >> 25 & 1)}, {"amx-bf16", tiles && (edx >> 22 & 1)}};
#undef ANYBIT_FEATURE
#else
  return {};
#endif
}

std::string refusal(Isa isa) {
  if (isa == Isa::scalar) return "";
#if defined(__x86_64__)
  std::vector<std::string> needed = {"avx2", "fma", "f16c", "bmi2"};
  if (isa >= Isa::avx512)
    needed.insert(needed.end(), {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512vbmi", "avx512vbmi2",
                                 "avx512bitalg", "gfni", "avx512vpopcntdq"});
  if (isa == Isa::amx) needed.insert(needed.end(), {"avx512bf16", "amx-tile", "amx-int8", "amx-bf16"});
  const auto features = cpu_features();
  for (const auto& need : needed)
    for (const auto& [feature, present] : features)
      if (feature == need && !present) return "this CPU (or this system) has no " + need;
  return "";
#else
  return "this build is not for x86-64";
#endif
}

}  // namespace anybit
