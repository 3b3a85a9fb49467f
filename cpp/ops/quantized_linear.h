// Products with quantised weights: quantises the activations, then multiplies.
#pragma once

#include "cpu/execution_context.h"
#include "cpu/packed_matrix.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// As linear(), which has checked the arguments.
void quantized_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                      const float* bias, const TensorView& out);

}  // namespace engine::ops
