#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

void softcap(const SoftcapArgs& args, int64_t begin, int64_t end) {
  const Vec16 cap = set1(args.cap);
  const int64_t full = args.n - args.n % 16;
  for (int64_t row = begin; row < end; ++row) {
    float* x = args.x + row * args.x_stride;
    for (int64_t i = 0; i < full; i += 16) store(x + i, mul(cap, tanh(div(load(x + i), cap))));
    const Vec16 tail = load_first(x + full, args.n - full);
    store_first(x + full, mul(cap, tanh(div(tail, cap))), args.n - full);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
