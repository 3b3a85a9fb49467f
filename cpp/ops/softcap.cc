#include "ops/softcap.h"

#include <cmath>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {

void softcap(cpu::ExecutionContext& context, const TensorView& x, float cap) {
  Dim T("T"), n("n");
  expect(x, "x", {DType::kFloat32}, {T, n}, Layout::kRows);
  if (!std::isfinite(cap) || cap <= 0) {
    throw Error(ErrorCode::kInvalidArgument, "cap: expected a positive number, got " + std::to_string(cap));
  }
  const SoftcapArgs args{.x = x.as<float>(), .x_stride = x.strides[0], .n = n, .cap = cap};
  const auto kernel = context.kernels().softcap;
  context.pool().parallel_for(T, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
