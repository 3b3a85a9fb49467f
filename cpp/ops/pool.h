#pragma once

#include "cpu/execution_context.h"
#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// Takes the rows of each text up into its row of `out`; see python/engine/ops/pool.py.
void pool(cpu::ExecutionContext& context, const TensorView& x, const TensorView& cu_rows,
          const TensorView& first_positions, PoolMode mode, const TensorView& out);

}  // namespace engine::ops
