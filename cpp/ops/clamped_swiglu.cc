#include "ops/clamped_swiglu.h"

#include <cmath>
#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

constexpr int64_t kRowsPerRange = 2;

void expect_positive(float value, const char* name) {
  if (std::isfinite(value) && value > 0) return;
  throw Error(ErrorCode::kInvalidArgument,
              std::string(name) + ": expected a positive number, got " + std::to_string(value));
}

}  // namespace

void clamped_swiglu(cpu::ExecutionContext& context, const TensorView& gate_up, float alpha, float limit,
                    const TensorView& out) {
  Dim T("T"), n("n");
  expect(out, "out", {DType::kFloat32}, {T, n}, Layout::kRows);
  expect(gate_up, "gate_up", {DType::kFloat32}, {T, 2 * n.value()}, Layout::kRows);
  expect_positive(alpha, "alpha");
  expect_positive(limit, "limit");
  const ClampedSwigluArgs args{
      .gate_up = gate_up.as<const float>(),
      .out = out.as<float>(),
      .gate_up_stride = gate_up.strides[0],
      .out_stride = out.strides[0],
      .n = n,
      .alpha = alpha,
      .limit = limit,
  };
  const auto kernel = context.kernels().clamped_swiglu;
  context.pool().parallel_for(T, kRowsPerRange, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
