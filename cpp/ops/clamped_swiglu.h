#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// out = (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate clamped from above; see
// python/engine/ops/clamped_swiglu.py.
void clamped_swiglu(cpu::ExecutionContext& context, const TensorView& gate_up, float alpha, float limit,
                    const TensorView& out);

}  // namespace engine::ops
