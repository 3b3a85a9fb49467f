#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Turns the pairs of q and k by the angles of their positions; see python/engine/ops/rope.py.
void rope(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k, const TensorView& cos,
          const TensorView& sin, const TensorView& positions);

// The same, and then append_kv of the turned k and of v, a few tokens at a time.
void rope_append_kv(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k,
                    const TensorView& v, const TensorView& cos, const TensorView& sin,
                    const TensorView& positions, const TensorView& k_cache, const TensorView& v_cache,
                    const TensorView& slot_ids, const TensorView* kv_scales);

}  // namespace engine::ops
