#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// out = silu(gate) * up, where gate_up holds gate and up side by side; see
// python/engine/ops/gated.py.
void silu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out);

// out = gelu(gate) * up, gelu in its tanh form.
void gelu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out);

}  // namespace engine::ops
