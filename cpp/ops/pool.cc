#include "ops/pool.h"

#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"

namespace engine::ops {
namespace {

void check_rows(const PoolArgs& args, int64_t B, int64_t T) {
  for (int64_t b = 0; b < B; ++b) {
    if (args.cu_rows[b] > args.cu_rows[b + 1]) {
      throw Error(ErrorCode::kInvalidArgument, "cu_rows: expected to ascend, got " +
                                                   std::to_string(args.cu_rows[b + 1]) + " at index " +
                                                   std::to_string(b + 1));
    }
  }
  if (args.cu_rows[0] != 0 || args.cu_rows[B] != T) {
    throw Error(ErrorCode::kInvalidArgument, "cu_rows: expected to go from 0 to T=" + std::to_string(T));
  }
}

}  // namespace

void pool(cpu::ExecutionContext& context, const TensorView& x, const TensorView& cu_rows,
          const TensorView& first_positions, PoolMode mode, const TensorView& out) {
  Dim T("T"), B("B"), n("n");
  expect(x, "x", {DType::kFloat32}, {T, n}, Layout::kRows);
  expect(first_positions, "first_positions", {DType::kInt32}, {B});
  expect(cu_rows, "cu_rows", {DType::kInt32}, {B + 1});
  expect(out, "out", {DType::kFloat32}, {B, n}, Layout::kRows);
  const PoolArgs args{
      .x = x.as<const float>(),
      .cu_rows = cu_rows.as<const int32_t>(),
      .first_positions = first_positions.as<const int32_t>(),
      .out = out.as<float>(),
      .x_stride = x.strides[0],
      .out_stride = out.strides[0],
      .n = n,
      .mode = mode,
  };
  check_rows(args, B, T);
  const auto kernel = context.kernels().pool;
  context.pool().parallel_for(B, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
