#include "ops_rows.h"

#include <cmath>
#include <limits>
#include <string>

#include "row_launchers.h"
#include "tensor_checks.h"

namespace engine::cuda {
namespace {

constexpr std::initializer_list<DType> kActivations = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};

void expect_positive(float value, const char* name) {
  if (std::isfinite(value) && value > 0) return;
  refuse(std::string(name) + ": expected a positive number, got " + std::to_string(value));
}

RmsNormArgs norm_args(const TensorView& x, const TensorView* residual, const TensorView& weight, float eps,
                      const TensorView& out) {
  Dim T("T"), H("H"), n("n");
  const auto expect_rows = [&](const TensorView& view, const char* name, std::initializer_list<DType> dtypes) {
    if (x.rank == 3) {
      expect(view, name, dtypes, {T, H, n}, Layout::kRows, kDevice);
    } else {
      expect(view, name, dtypes, {T, n}, Layout::kRows, kDevice);
    }
  };
  expect_rows(x, "x", kActivations);
  RmsNormArgs args{};
  if (residual != nullptr) {
    expect_rows(*residual, "residual", {x.dtype});
    args.residual = residual->data;
    args.residual_stride = residual->strides[0];
  }
  expect(weight, "weight", {DType::kFloat32}, {n}, Layout::kContiguous, kDevice);
  expect_rows(out, "out", {x.dtype});
  if (n > std::numeric_limits<int32_t>::max()) refuse("x: expected rows of less than 2^31 elements");
  args.x = x.data;
  args.x_stride = x.strides[0];
  args.weight = weight.as<const float>();
  args.out = out.data;
  args.out_stride = out.strides[0];
  args.heads = x.rank == 3 ? static_cast<int32_t>(H) : 1;
  args.num_rows = T * args.heads;
  args.n = static_cast<int32_t>(n);
  args.eps = eps;
  args.format = format_of(x.dtype);
  return args;
}

}  // namespace

void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out) {
  rms_norm(norm_args(x, nullptr, weight, eps, out), x.stream);
}

void add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, float eps,
                  const TensorView& out) {
  rms_norm(norm_args(x, &residual, weight, eps, out), x.stream);
}

void gated(Gate gate, const TensorView& gate_up, const TensorView& out, float alpha, float limit) {
  Dim T("T"), n("n");
  expect(out, "out", kActivations, {T, n}, Layout::kRows, kDevice);
  expect(gate_up, "gate_up", {out.dtype}, {T, 2 * n.value()}, Layout::kRows, kDevice);
  expect_positive(alpha, "alpha");
  expect_positive(limit, "limit");
  GatedArgs args{};
  args.gate_up = gate_up.data;
  args.gate_up_stride = gate_up.strides[0];
  args.out = out.data;
  args.out_stride = out.strides[0];
  args.T = T;
  args.n = n;
  args.alpha = alpha;
  args.limit = limit;
  args.gate = gate;
  args.format = format_of(out.dtype);
  gated(args, out.stream);
}

void softcap(const TensorView& x, float cap) {
  Dim T("T"), n("n");
  expect(x, "x", {DType::kFloat32}, {T, n}, Layout::kRows, kDevice);
  expect_positive(cap, "cap");
  SoftcapArgs args{};
  args.x = x.as<float>();
  args.x_stride = x.strides[0];
  args.T = T;
  args.n = n;
  args.cap = cap;
  softcap(args, x.stream);
}

void embedding(const TensorView& token_ids, const TensorView& weight, const TensorView& out) {
  Dim T("T"), V("V"), K("K");
  expect(token_ids, "token_ids", {DType::kInt32}, {T}, Layout::kContiguous, kDevice);
  expect(weight, "weight", kActivations, {V, K}, Layout::kRows, kDevice);
  expect(out, "out", {weight.dtype}, {T, K}, Layout::kRows, kDevice);
  EmbeddingArgs args{};
  args.token_ids = token_ids.as<const int32_t>();
  args.weight = weight.data;
  args.weight_stride = weight.strides[0];
  args.out = out.data;
  args.out_stride = out.strides[0];
  args.T = T;
  args.V = V;
  args.K = K;
  args.format = format_of(weight.dtype);
  embedding(args, out.stream);
}

}  // namespace engine::cuda
