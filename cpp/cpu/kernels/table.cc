// Compiled once per instruction set, like every file in this folder: exports its table and
// nothing else.
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {

#define ENGINE_KERNEL(name, Args) void name(const Args&, int64_t, int64_t);
#include "cpu/kernel_list.inc"
#undef ENGINE_KERNEL

extern const KernelTable kTable;
const KernelTable kTable = {
#define ENGINE_KERNEL(name, Args) &name,
#include "cpu/kernel_list.inc"
#undef ENGINE_KERNEL
};

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
