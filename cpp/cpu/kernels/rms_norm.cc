#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  const int64_t full = n - n % 16;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = row / args.heads;
    const int64_t column = row % args.heads * n;
    const float* x = args.x + token * args.x_stride + column;
    float* out = args.out + token * args.out_stride + column;
    if (args.residual != nullptr) {
      float* residual = args.residual + token * args.residual_stride + column;
      for (int64_t i = 0; i < full; i += 16) store(residual + i, add(load(residual + i), load(x + i)));
      store_first(residual + full, add(load_first(residual + full, n - full), load_first(x + full, n - full)),
                  n - full);
      x = residual;
    }
    Vec16 squares = zero();
    for (int64_t i = 0; i < full; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const Vec16 tail = load_first(x + full, n - full);
    squares = fma(tail, tail, squares);
    const float mean = reduce_add(squares) / static_cast<float>(n);
    const Vec16 scale = set1(1.0f / __builtin_sqrtf(mean + args.eps));
    for (int64_t i = 0; i < full; i += 16) store(out + i, mul(load(args.weight + i), mul(load(x + i), scale)));
    store_first(out + full, mul(load_first(args.weight + full, n - full), mul(tail, scale)), n - full);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
