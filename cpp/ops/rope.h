#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Turns the pairs of q and k by the angles of their positions; see python/engine/ops/rope.py.
void rope(cpu::ExecutionContext& context, const TensorView& q, const TensorView& k, const TensorView& cos,
          const TensorView& sin, const TensorView& positions);

}  // namespace engine::ops
