#include "cpu/kernels/convert.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {

void round_rows(const RoundRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_stride;
    uint16_t* out = args.out + row * args.out_stride;
    for (int64_t k = 0; k < args.in_features; ++k) convert(x[k], out[k]);
    for (int64_t k = args.in_features; k < args.out_stride; ++k) out[k] = 0;
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
