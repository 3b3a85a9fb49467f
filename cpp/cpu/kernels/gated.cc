#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

// Both are x / (1 + e^y), and zero where e^y passes the range of exp(): the results there are
// smaller than 1e-36.
struct Silu {
  ENGINE_INLINE Vec16 apply(Vec16 x) {
    const Vec16 one = set1(1.0f);
    return zero_where_less(div(x, add(one, exp(sub(zero(), x)))), x, set1(-88.0f));
  }
};

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^-2u).
struct TanhGelu {
  ENGINE_INLINE Vec16 apply(Vec16 x) {
    const Vec16 one = set1(1.0f);
    const Vec16 minus_2u_over_x = mul(set1(-1.5957691216f), fma(mul(x, x), set1(0.044715f), one));
    return zero_where_less(div(x, add(one, exp(mul(minus_2u_over_x, x)))), x, set1(-10.0f));
  }
};

template <typename Activation>
ENGINE_INLINE void run(const GatedArgs& args, int64_t begin, int64_t end) {
  const int64_t n = args.n;
  const int64_t full = n - n % 16;
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = args.gate_up + row * args.gate_up_stride;
    const float* up = gate + n;
    float* out = args.out + row * args.out_stride;
    for (int64_t i = 0; i < full; i += 16) store(out + i, mul(Activation::apply(load(gate + i)), load(up + i)));
    const int64_t rest = n - full;
    store_first(out + full, mul(Activation::apply(load_first(gate + full, rest)), load_first(up + full, rest)),
                rest);
  }
}

}  // namespace

void silu_mul(const GatedArgs& args, int64_t begin, int64_t end) { run<Silu>(args, begin, end); }
void gelu_mul(const GatedArgs& args, int64_t begin, int64_t end) { run<TanhGelu>(args, begin, end); }

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
