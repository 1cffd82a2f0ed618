#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace anybit {
namespace {

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx};
std::atomic<int> active{-1};

Isa parse(const std::string& text, const std::string& origin) {
  for (Isa isa : kAll) {
    if (text != name(isa)) continue;
    if (const auto reason = refusal(isa); !reason.empty()) throw std::invalid_argument(origin + text + " cannot run: " + reason);
    return isa;
  }
  throw std::invalid_argument(origin + text + " is unknown; use scalar, avx2, avx512 or amx");
}

Isa choose() {
  if (const char* forced = std::getenv("ANYBIT_ISA"); forced && *forced) return parse(forced, "ANYBIT_ISA=");
  Isa best = Isa::scalar;
  for (Isa isa : kAll)
    if (refusal(isa).empty()) best = isa;
  return best;
}

}  // namespace

Isa active_isa() {
  int isa = active.load(std::memory_order_relaxed);
  if (isa < 0) active.store(isa = static_cast<int>(choose()), std::memory_order_relaxed);
  return static_cast<Isa>(isa);
}

void set_isa(const std::string& wanted) { active.store(static_cast<int>(parse(wanted, "isa ")), std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (refusal(isa).empty()) names.emplace_back(name(isa));
  return names;
}

}  // namespace anybit
