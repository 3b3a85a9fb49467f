// Tensors of `sample` and `score_tokens`, and what every device's op makes of them; shapes, dtypes and meaning
// stand in python/engine/ops/sampling.py.
#pragma once

#include <optional>

#include "engine/kernel_args.h"
#include "engine/tensor_view.h"

namespace engine::ops {

// The tensors of SamplingArgs.
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

// The tensors of ScoringArgs.
struct ScoringTensors {
  TensorView logits, token_ids, num_top_logprobs, out_logprobs, top_ids, top_logprobs;
  bool reports_logits;
};

// Checks shapes, dtypes and devices, not what the tensors hold. `num_rows` becomes their R.
SamplingArgs sampling_args(const SamplingTensors& tensors, DeviceType device, int64_t& num_rows);
ScoringArgs scoring_args(const ScoringTensors& tensors, DeviceType device, int64_t& num_rows);

}  // namespace engine::ops
