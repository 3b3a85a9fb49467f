#include "cpu/kernels/activations.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

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
void erf_gelu_mul(const GatedArgs& args, int64_t begin, int64_t end) { run<ErfGelu>(args, begin, end); }

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
