#pragma once

#include "cpu/execution_context.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Writes keys and values into the slots of their tokens; see python/engine/ops/append_kv.py.
void append_kv(cpu::ExecutionContext& context, const TensorView& k, const TensorView& v,
               const TensorView& k_cache, const TensorView& v_cache, const TensorView& slot_ids,
               const TensorView* kv_scales);

// The same as the kernel takes it, checked.
AppendKvArgs append_kv_args(const TensorView& k, const TensorView& v, const TensorView& k_cache,
                            const TensorView& v_cache, const TensorView& slot_ids, const TensorView* kv_scales);

}  // namespace engine::ops
