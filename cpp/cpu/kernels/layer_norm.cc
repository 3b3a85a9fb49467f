#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

alignas(64) constexpr float kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

ENGINE_INLINE void add_to_residual(const float* x, float* residual, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(residual + i, add(load(residual + i), load(x + i)));
  store_first(residual + i, add(load_first(residual + i, n - i), load_first(x + i, n - i)), n - i);
}

}  // namespace

// The mean, then the mean of squared distances to it, both with lanes along the row and reduce_add's
// tree.
void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  const int64_t full = n - n % 16;
  const int64_t rest = n - full;
  const float count = static_cast<float>(n);
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_stride;
    float* out = args.out + row * args.out_stride;
    if (args.residual != nullptr) {
      float* residual = args.residual + row * args.residual_stride;
      add_to_residual(x, residual, n);
      x = residual;
    }
    const Vec16 tail = load_first(x + full, rest);
    Vec16 sums = tail;
    for (int64_t i = 0; i < full; i += 16) sums = add(sums, load(x + i));
    const Vec16 mean = set1(reduce_add(sums) / count);
    const Vec16 tail_distance = sub(tail, mul(mean, load_first(kOnes, rest)));
    Vec16 squares = mul(tail_distance, tail_distance);
    for (int64_t i = 0; i < full; i += 16) {
      const Vec16 distance = sub(load(x + i), mean);
      squares = fma(distance, distance, squares);
    }
    const Vec16 scale = set1(1.0f / __builtin_sqrtf(reduce_add(squares) / count + args.eps));
    for (int64_t i = 0; i < full; i += 16) {
      const Vec16 normed = mul(mul(sub(load(x + i), mean), scale), load(args.weight + i));
      store(out + i, args.bias == nullptr ? normed : add(normed, load(args.bias + i)));
    }
    if (rest == 0) continue;
    const Vec16 normed = mul(mul(tail_distance, scale), load_first(args.weight + full, rest));
    store_first(out + full, args.bias == nullptr ? normed : add(normed, load_first(args.bias + full, rest)),
                rest);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
