#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// x / (1 + e^-(alpha x)), which is zero to the last bit of anything it is added to where the
// exponent passes the range of exp().
ENGINE_INLINE Vec16 swish(Vec16 x, Vec16 alpha) {
  const Vec16 scaled = mul(alpha, x);
  return zero_where_less(div(x, add(set1(1.0f), exp(sub(zero(), scaled)))), scaled, set1(-88.0f));
}

ENGINE_INLINE Vec16 gate(Vec16 gate, Vec16 up, Vec16 alpha, Vec16 limit) {
  const Vec16 clamped_up = max(min(up, limit), sub(zero(), limit));
  return mul(add(clamped_up, set1(1.0f)), swish(min(gate, limit), alpha));
}

}  // namespace

void clamped_swiglu(const ClampedSwigluArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  const int64_t full = n - n % 16;
  const Vec16 alpha = set1(args.alpha), limit = set1(args.limit);
  for (int64_t row = begin; row < end; ++row) {
    const float* first = args.gate_up + row * args.gate_up_stride;
    const float* second = first + n;
    float* out = args.out + row * args.out_stride;
    for (int64_t i = 0; i < full; i += 16) {
      store(out + i, gate(load(first + i), load(second + i), alpha, limit));
    }
    const int64_t rest = n - full;
    store_first(out + full, gate(load_first(first + full, rest), load_first(second + full, rest), alpha, limit),
                rest);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
