// Drawing tokens on the device; see ops.h.
#pragma once

#include <cstdint>

#include "engine/tensor_view.h"
#include "ops/sampling_args.h"

namespace engine::cuda {

// Bytes of device memory that `sample` and `score_tokens` of R rows, V tokens and K reported ones work in.
int64_t sampling_scratch_bytes(int64_t num_rows, int64_t vocab_size, int64_t num_top);

// `scratch` is uint8 of at least as many bytes, from a multiple of 16 on.
void sample(const TensorView& scratch, const ops::SamplingTensors& tensors);
void score_tokens(const TensorView& scratch, const ops::ScoringTensors& tensors);

}  // namespace engine::cuda
