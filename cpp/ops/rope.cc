#include "ops/rope.h"

#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

constexpr int64_t kTokensPerRange = 4;

void check_positions(const int32_t* positions, int64_t count, int64_t limit) {
  for (int64_t t = 0; t < count; ++t) {
    if (positions[t] < 0 || positions[t] >= limit) {
      throw Error(ErrorCode::kInvalidArgument, "positions: expected 0 to " + std::to_string(limit - 1) +
                                                   " (rows of cos), got " + std::to_string(positions[t]) +
                                                   " at index " + std::to_string(t));
    }
  }
}

}  // namespace

void rope(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k, const TensorView& cos,
          const TensorView& sin, const TensorView& positions) {
  Dim T("T"), H("H"), G("G"), D("D"), P("P"), half("R/2");
  expect(q, "q", {DType::kFloat32}, {T, H, D}, Layout::kRows);
  expect(k, "k", {DType::kFloat32}, {T, G, D}, Layout::kRows);
  expect(cos, "cos", {DType::kFloat32}, {P, half});
  expect(sin, "sin", {DType::kFloat32}, {P, half});
  expect(positions, "positions", {DType::kInt32}, {T});
  if (half > D / 2) {
    throw Error(ErrorCode::kInvalidArgument,
                "cos: expected at most D/2=" + std::to_string(D / 2) + " columns, got " + std::to_string(half));
  }
  check_positions(positions.as<const int32_t>(), T, P);
  const RopeArgs args{
      .q = q.as<float>(),
      .k = k.as<float>(),
      .cos = cos.as<const float>(),
      .sin = sin.as<const float>(),
      .positions = positions.as<const int32_t>(),
      .q_stride = q.strides[0],
      .k_stride = k.strides[0],
      .H = H,
      .G = G,
      .D = D,
      .half = half,
  };
  const auto kernel = context.kernels().rope;
  context.pool().parallel_for(T, kTokensPerRange,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
