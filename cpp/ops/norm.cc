#include "ops/norm.h"

#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

constexpr int64_t kRowsPerRange = 8;

void launch(cpu::ExecutionContext& context, const TensorView& x, const TensorView* residual,
            const TensorView& weight, float eps, const TensorView& out) {
  Dim T("T"), H("H"), n("n");
  const auto expect_rows = [&](const TensorView& view, const char* name) {
    if (x.rank == 3) {
      expect(view, name, {DType::kFloat32}, {T, H, n}, Layout::kRows);
    } else {
      expect(view, name, {DType::kFloat32}, {T, n}, Layout::kRows);
    }
  };
  expect_rows(x, "x");
  if (residual != nullptr) expect_rows(*residual, "residual");
  expect(weight, "weight", {DType::kFloat32}, {n});
  expect_rows(out, "out");
  RmsNormArgs args{};
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  if (residual != nullptr) {
    args.residual = residual->as<float>();
    args.residual_stride = residual->strides[0];
  }
  args.weight = weight.as<const float>();
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.n = n;
  args.heads = x.rank == 3 ? H.value() : 1;
  args.eps = eps;
  const auto kernel = context.kernels().rms_norm;
  context.pool().parallel_for(T * args.heads, kRowsPerRange,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void rms_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView& weight, float eps,
              const TensorView& out) {
  launch(context, x, nullptr, weight, eps, out);
}

void add_rms_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView& residual,
                  const TensorView& weight, float eps, const TensorView& out) {
  launch(context, x, &residual, weight, eps, out);
}

void layer_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView* residual,
                const TensorView& weight, const TensorView* bias, float eps, const TensorView& out) {
  Dim T("T"), n("n");
  expect(x, "x", {DType::kFloat32}, {T, n}, Layout::kRows);
  expect(weight, "weight", {DType::kFloat32}, {n});
  if (bias != nullptr) expect(*bias, "bias", {DType::kFloat32}, {n});
  expect(out, "out", {DType::kFloat32}, {T, n}, Layout::kRows);
  LayerNormArgs args{};
  args.x = x.as<const float>();
  args.x_stride = x.strides[0];
  if (residual != nullptr) {
    expect(*residual, "residual", {DType::kFloat32}, {T, n}, Layout::kRows);
    args.residual = residual->as<float>();
    args.residual_stride = residual->strides[0];
  }
  args.weight = weight.as<const float>();
  args.bias = bias != nullptr ? bias->as<const float>() : nullptr;
  args.out = out.as<float>();
  args.out_stride = out.strides[0];
  args.n = n;
  args.eps = eps;
  const auto kernel = context.kernels().layer_norm;
  context.pool().parallel_for(T, kRowsPerRange, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
