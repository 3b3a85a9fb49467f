#pragma once

#include "cpu/execution_context.h"
#include "ops/sampling_args.h"

namespace engine::ops {

// Draws one token a row.
void sample(cpu::ExecutionContext& context, const SamplingTensors& tensors);

// Log-probabilities of known tokens, one a row.
void score_tokens(cpu::ExecutionContext& context, const ScoringTensors& tensors);

}  // namespace engine::ops
