#include "ops/rope.h"

#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"
#include "ops/append_kv.h"

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

// Checks the tensors.
RopeArgs rope_args(const TensorView& q, const TensorView& k, const TensorView& cos, const TensorView& sin,
                   const TensorView& positions) {
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
  return {
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
}

}  // namespace

void rope(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k, const TensorView& cos,
          const TensorView& sin, const TensorView& positions) {
  const RopeArgs args = rope_args(q, k, cos, sin, positions);
  const auto kernel = context.kernels().rope;
  context.pool().parallel_for(positions.shape[0], kTokensPerRange,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void rope_append_kv(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k,
                    const TensorView& v, const TensorView& cos, const TensorView& sin,
                    const TensorView& positions, const TensorView& k_cache, const TensorView& v_cache,
                    const TensorView& slot_ids, const TensorView* kv_scales) {
  const RopeArgs turn = rope_args(q, k, cos, sin, positions);
  const AppendKvArgs append = append_kv_args(k, v, k_cache, v_cache, slot_ids, kv_scales);
  const cpu::KernelTable& kernels = context.kernels();
  context.pool().parallel_for(positions.shape[0], kTokensPerRange, [&](int64_t begin, int64_t end) {
    kernels.rope(turn, begin, end);
    kernels.append_kv(append, begin, end);
  });
}

}  // namespace engine::ops
