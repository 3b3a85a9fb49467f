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

struct QuantizedLayer {
  const cpu::PackedMatrix& weight;
  const float* bias;  // or null
};

// As gated_mlp(), which has checked the arguments: `product` goes from the first product to the second as
// codes. The columns of `down` must be in their own order.
void quantized_gated_mlp(cpu::ExecutionContext& context, const TensorView& x, const QuantizedLayer& gate_up,
                         GateKernel gate, const TensorView& product, const QuantizedLayer& down,
                         const TensorView& out);

}  // namespace engine::ops
