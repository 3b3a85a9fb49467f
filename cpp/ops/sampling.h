#pragma once

#include <optional>

#include "cpu/execution_context.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// The tensors of SamplingArgs; shapes, dtypes and meaning stand in python/engine/ops/sampling.py.
struct SamplingTensors {
  TensorView logits, workspace, seen;
  TensorView temperature, top_k, top_p, min_p;
  TensorView repetition_penalty, frequency_penalty, presence_penalty;
  TensorView seeds, choices, positions;
  TensorView token_ids, token_indptr, prompt_lens;
  TensorView bias_ids, bias_values, bias_indptr;
  std::optional<TensorView> bitmask;
  TensorView num_top_logprobs, out_ids, out_logprobs, top_ids, top_logprobs;
  bool reports_processed, reports_logits;
};

// Draws one token a row.
void sample(cpu::ExecutionContext& context, const SamplingTensors& tensors);

// The tensors of ScoringArgs; shapes and meaning stand in python/engine/ops/sampling.py.
struct ScoringTensors {
  TensorView logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs;
  bool reports_logits;
};

// Log-probabilities of known tokens, one a row.
void score_tokens(cpu::ExecutionContext& context, const ScoringTensors& tensors);

}  // namespace engine::ops
