// From an instruction set to its kernels.
#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {

// `isa` must be one of available_isas().
const KernelTable& kernels_for(Isa isa);

}  // namespace engine::cpu
