// The ops of the CUDA backend: tensors are checked, and work is put on the stream that is current for them.
// What lies on the device cannot be looked at without waiting for it, so indices are checked by the kernels.
// See python/engine/ops/cuda/ for what each does.
#pragma once

#include "engine/tensor_view.h"

namespace engine::cuda {

// Where tensors are expected. The emulator of tests/cuda_host runs kernels on tensors of the CPU.
#ifdef ENGINE_SIMT_HOST
inline constexpr DeviceType kDevice = DeviceType::kCpu;
#else
inline constexpr DeviceType kDevice = DeviceType::kCuda;
#endif

void append_kv(const TensorView& k, const TensorView& v, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& slot_ids, const TensorView* kv_scales);

void rope_append_kv(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& cos,
                    const TensorView& sin, const TensorView& positions, const TensorView& k_cache,
                    const TensorView& v_cache, const TensorView& slot_ids, const TensorView* kv_scales);

// Floats that decode_attention needs for results of splits.
int64_t num_partials(int64_t num_rows, int64_t max_kv_len, int64_t window, int64_t num_heads, int64_t head_dim);

void decode_attention(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                      const TensorView& sequences, const TensorView& cu_seqlens_q, const TensorView& kv_lens,
                      const TensorView& block_tables, int64_t max_kv_len, float scale, int64_t window,
                      float softcap, const TensorView& out, const TensorView* sinks,
                      const TensorView* kv_scales, const TensorView& partials, const TensorView& arrivals);

}  // namespace engine::cuda
