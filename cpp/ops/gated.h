#pragma once

#include "cpu/execution_context.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// out = silu(gate) * up, where gate_up holds gate and up side by side; see
// python/engine/ops/gated.py.
void silu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out);

// out = gelu(gate) * up, gelu in its tanh form.
void gelu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out);

// out = gelu(gate) * up, gelu in its exact form.
void erf_gelu_mul(cpu::ExecutionContext& context, const TensorView& gate_up, const TensorView& out);

// out = activation(x); out may be x.
void activate(cpu::ExecutionContext& context, const TensorView& x, Activation activation,
              const TensorView& out);

}  // namespace engine::ops
