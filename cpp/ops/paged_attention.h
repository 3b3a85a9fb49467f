#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Causal attention of the last rows of each sequence over its cached tokens; `sinks` and `kv_scales` may be
// null. See python/engine/ops/paged_attention.py.
void paged_attention(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k_cache,
                     const TensorView& v_cache, const TensorView& cu_seqlens_q, const TensorView& kv_lens,
                     const TensorView& block_tables, float scale, int64_t window, float softcap, bool is_causal,
                     const TensorView& out, const TensorView* sinks, const TensorView* kv_scales);

}  // namespace engine::ops
