// Products with quantised weights: quantises the activations, then multiplies.
#pragma once

#include "cpu/execution_context.h"
#include "cpu/packed_matrix.h"
#include "engine/tensor_view.h"
#include "ops/products.h"

namespace engine::ops {

// As linear() or gated_linear(), which have checked the arguments.
void quantized_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                      const float* bias, GateKernel gate, const TensorView& out);

}  // namespace engine::ops
