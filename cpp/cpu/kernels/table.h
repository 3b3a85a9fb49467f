// One table of kernel entry points per instruction set.
#pragma once

#include <cstdint>

#include "engine/kernel_args.h"

namespace engine::cpu {

struct KernelTable {
#define ENGINE_KERNEL(name, Args) void (*name)(const Args&, int64_t begin, int64_t end);
#include "cpu/kernel_list.inc"
#undef ENGINE_KERNEL
};

}  // namespace engine::cpu
