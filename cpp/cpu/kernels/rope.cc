#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// Two products and one rounding more than fma would have: the arithmetic that float32 models are
// trained and published with.
ENGINE_INLINE Vec16 turn_first(Vec16 x, Vec16 y, Vec16 c, Vec16 s) { return sub(mul(x, c), mul(y, s)); }
ENGINE_INLINE Vec16 turn_second(Vec16 x, Vec16 y, Vec16 c, Vec16 s) { return add(mul(y, c), mul(x, s)); }

ENGINE_INLINE void turn_head(float* first, const float* cos, const float* sin, int64_t half) {
  float* second = first + half;
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const Vec16 x = load(first + i), y = load(second + i), c = load(cos + i), s = load(sin + i);
    store(first + i, turn_first(x, y, c, s));
    store(second + i, turn_second(x, y, c, s));
  }
  if (i == half) return;
  const int64_t rest = half - i;
  const Vec16 x = load_first(first + i, rest), y = load_first(second + i, rest);
  const Vec16 c = load_first(cos + i, rest), s = load_first(sin + i, rest);
  store_first(first + i, turn_first(x, y, c, s), rest);
  store_first(second + i, turn_second(x, y, c, s), rest);
}

}  // namespace

void rope(const RopeArgs& args, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = args.cos + args.positions[t] * args.half;
    const float* sin = args.sin + args.positions[t] * args.half;
    float* q = args.q + t * args.q_stride;
    float* k = args.k + t * args.k_stride;
    for (int64_t h = 0; h < args.H; ++h) turn_head(q + h * args.D, cos, sin, args.half);
    for (int64_t g = 0; g < args.G; ++g) turn_head(k + g * args.D, cos, sin, args.half);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
