#pragma once

#include "cpu/execution_context.h"
#include "cpu/packed_matrix.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// out = x weight^T + bias; `bias` may be null. See python/engine/ops/linear.py.
void linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
            const TensorView* bias, const TensorView& out);

// out = activation(gate) * up, of which x weight^T + bias is made; see python/engine/ops/gated.py.
void gated_linear(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& weight,
                  const TensorView* bias, Activation activation, const TensorView& out);

// out = product down^T + bias, `product` being what gated_linear() makes of x, or anything: see
// python/engine/ops/gated.py.
void gated_mlp(cpu::ExecutionContext& context, const TensorView& x, const cpu::PackedMatrix& gate_up,
               const TensorView* gate_up_bias, Activation activation, const TensorView& product,
               const cpu::PackedMatrix& down, const TensorView* down_bias, const TensorView& out);

// out[t] = weight[token_ids[t]]. See python/engine/ops/embedding.py.
void embedding(cpu::ExecutionContext& context, const TensorView& token_ids, const cpu::PackedMatrix& weight,
               const TensorView& out);

}  // namespace engine::ops
