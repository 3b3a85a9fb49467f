#pragma once

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// out = x / rms(x) * weight over the last of two or three dimensions; see python/engine/ops/rms_norm.py.
void rms_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView& weight, float eps,
              const TensorView& out);

// residual += x, then out = residual / rms(residual) * weight.
void add_rms_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView& residual,
                  const TensorView& weight, float eps, const TensorView& out);

// residual += x if there is one, then out = (x - mean) / deviation * weight + bias; see
// python/engine/ops/layer_norm.py.
void layer_norm(cpu::ExecutionContext& context, const TensorView& x, const TensorView* residual,
                const TensorView& weight, const TensorView* bias, float eps, const TensorView& out);

}  // namespace engine::ops
