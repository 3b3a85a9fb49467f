#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// x = cap * tanh(x / cap), in place; see python/engine/ops/softcap.py.
void softcap(cpu::ExecutionContext& context, const TensorView& x, float cap);

}  // namespace engine::ops
