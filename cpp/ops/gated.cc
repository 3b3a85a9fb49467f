#include "ops/gated.h"

#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

constexpr int64_t kRowsPerRange = 2;

using Kernel = decltype(cpu::KernelTable::silu_mul);

void launch(cpu::ExecutionContext& context, Kernel kernel, const TensorView& gate_up, const TensorView& out) {
  Dim T("T"), n("n");
  expect(out, "out", {DType::kFloat32}, {T, n}, Layout::kRows);
  expect(gate_up, "gate_up", {DType::kFloat32}, {T, 2 * n.value()}, Layout::kRows);
  const GatedArgs args{
      .gate_up = gate_up.as<const float>(),
      .out = out.as<float>(),
      .gate_up_stride = gate_up.strides[0],
      .out_stride = out.strides[0],
      .n = n,
  };
  context.pool().parallel_for(T, kRowsPerRange, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void silu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out) {
  launch(context, context.kernels().silu_mul, gate_up, out);
}

void gelu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out) {
  launch(context, context.kernels().gelu_mul, gate_up, out);
}

void erf_gelu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out) {
  launch(context, context.kernels().erf_gelu_mul, gate_up, out);
}

void activate(cpu::ExecutionContext& context, const TensorView& x, Activation activation,
              const TensorView& out) {
  Dim T("T"), n("n");
  expect(x, "x", {DType::kFloat32}, {T, n}, Layout::kRows);
  expect(out, "out", {DType::kFloat32}, {T, n}, Layout::kRows);
  const ActivateArgs args{
      .x = x.as<const float>(),
      .out = out.as<float>(),
      .x_stride = x.strides[0],
      .out_stride = out.strides[0],
      .n = n,
      .activation = activation,
  };
  const auto kernel = context.kernels().activate;
  context.pool().parallel_for(T, kRowsPerRange, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
