// The KV cache as ops get it.
#pragma once

#include "engine/error.h"
#include "engine/kernel_args.h"
#include "engine/tensor_spec.h"

namespace engine::ops {

// Checks the tensors of a cache: `k_cache` [N, G, D, S] and `v_cache` [N, G, S, D], of codes if and only if
// there are `kv_scales` [N, G, 2, S].
inline CacheFormat expect_cache(const TensorView& k_cache, const TensorView& v_cache,
                                const TensorView* kv_scales, Dim& N, Dim& G, Dim& D, Dim& S) {
  expect(k_cache, "k_cache", {DType::kBFloat16, DType::kFloat32, DType::kInt8}, {N, G, D, S}, Layout::kRows);
  expect(v_cache, "v_cache", {k_cache.dtype}, {N, G, S, D}, Layout::kRows);
  const bool is_quantized = k_cache.dtype == DType::kInt8;
  if (is_quantized != (kv_scales != nullptr)) {
    throw Error(ErrorCode::kInvalidArgument, is_quantized
                                                 ? "kv_scales: expected those of an int8 cache, got None"
                                                 : "kv_scales: expected None beside a cache of floats");
  }
  if (kv_scales != nullptr) expect(*kv_scales, "kv_scales", {DType::kFloat32}, {N, G, 2, S}, Layout::kRows);
  if (is_quantized) return CacheFormat::kInt8;
  return k_cache.dtype == DType::kBFloat16 ? CacheFormat::kBFloat16 : CacheFormat::kFloat32;
}

}  // namespace engine::ops
