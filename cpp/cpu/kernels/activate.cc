#include "cpu/kernels/activations.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

template <typename Activation>
ENGINE_INLINE void run(const ActivateArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_stride;
    float* out = args.out + row * args.out_stride;
    int64_t i = 0;
    for (; i + 16 <= args.n; i += 16) store(out + i, Activation::apply(load(x + i)));
    store_first(out + i, Activation::apply(load_first(x + i, args.n - i)), args.n - i);
  }
}

}  // namespace

void activate(const ActivateArgs& args, int64_t begin, int64_t end) {
  switch (args.activation) {
    case Activation::kGelu: return run<ErfGelu>(args, begin, end);
    case Activation::kTanhGelu: return run<TanhGelu>(args, begin, end);
    case Activation::kSilu: return run<Silu>(args, begin, end);
    case Activation::kRelu: return run<Relu>(args, begin, end);
    case Activation::kTanh: return run<Tanh>(args, begin, end);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
