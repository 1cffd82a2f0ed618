// Which instruction set runs: the best this CPU has, or the one that ANYBIT_ISA (or set_isa) forces.
#pragma once

#include <string>
#include <vector>

#include "cpu_features.h"

namespace anybit {

// Throws std::invalid_argument when ANYBIT_ISA names an unknown set or one that cannot run here.
Isa active_isa();

// Forces one; throws std::invalid_argument with the reason when it is unknown or cannot run here.
void set_isa(const std::string& wanted);
std::vector<std::string> available_isas();

}  // namespace anybit
