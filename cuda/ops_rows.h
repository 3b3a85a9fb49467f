// Ops that go over rows; see ops.h.
#pragma once

#include "engine/tensor_view.h"
#include "row_args.h"

namespace engine::cuda {

void rms_norm(const TensorView& x, const TensorView& weight, float eps, const TensorView& out);
void add_rms_norm(const TensorView& x, const TensorView& residual, const TensorView& weight, float eps,
                  const TensorView& out);

// `alpha` and `limit` are those of kClampedSwiglu.
void gated(Gate gate, const TensorView& gate_up, const TensorView& out, float alpha = 1, float limit = 1);

void softcap(const TensorView& x, float cap);

void embedding(const TensorView& token_ids, const TensorView& weight, const TensorView& out);

}  // namespace engine::cuda
