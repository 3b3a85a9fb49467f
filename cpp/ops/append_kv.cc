#include "ops/append_kv.h"

#include <string>

#include "engine/error.h"
#include "engine/tensor_spec.h"
#include "ops/kv_cache.h"

namespace engine::ops {
namespace {

constexpr int64_t kTokensPerRange = 16;

void check_slots(const int64_t* slot_ids, int64_t count, int64_t num_slots) {
  for (int64_t t = 0; t < count; ++t) {
    if (slot_ids[t] < 0 || slot_ids[t] >= num_slots) {
      throw Error(ErrorCode::kInvalidArgument, "slot_ids: expected 0 to " + std::to_string(num_slots - 1) +
                                                   ", got " + std::to_string(slot_ids[t]) + " at index " +
                                                   std::to_string(t));
    }
  }
}

}  // namespace

AppendKvArgs append_kv_args(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                            const TensorView& v_cache, const TensorView& slot_ids,
                            const TensorView* kv_scales) {
  Dim T("T"), G("G"), D("D"), N("N"), S("S");
  expect(k, "k", {DType::kFloat32}, {T, G, D}, Layout::kRows);
  expect(v, "v", {DType::kFloat32}, {T, G, D}, Layout::kRows);
  const CacheFormat format = expect_cache(k_cache, v_cache, kv_scales, N, G, D, S);
  expect(slot_ids, "slot_ids", {DType::kInt64}, {T});
  check_slots(slot_ids.as<const int64_t>(), T, N * S);
  return {
      .k = k.as<const float>(),
      .v = v.as<const float>(),
      .k_cache = k_cache.data,
      .v_cache = v_cache.data,
      .kv_scales = kv_scales == nullptr ? nullptr : kv_scales->as<float>(),
      .slot_ids = slot_ids.as<const int64_t>(),
      .k_stride = k.strides[0],
      .v_stride = v.strides[0],
      .k_block_stride = k_cache.strides[0],
      .v_block_stride = v_cache.strides[0],
      .scales_block_stride = kv_scales == nullptr ? 0 : kv_scales->strides[0],
      .G = G,
      .D = D,
      .S = S,
      .format = format,
  };
}

void append_kv(cpu::ExecutionContext& context, const TensorView& k, const TensorView& v,
               const TensorView& k_cache, const TensorView& v_cache, const TensorView& slot_ids,
               const TensorView* kv_scales) {
  const AppendKvArgs args = append_kv_args(k, v, k_cache, v_cache, slot_ids, kv_scales);
  const auto kernel = context.kernels().append_kv;
  context.pool().parallel_for(k.shape[0], kTokensPerRange,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace engine::ops
