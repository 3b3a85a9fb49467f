// First part of sampling: penalties, biases and mask make the logits that are sampled from, in the workspace
// where they differ from the model's, and each chunk finds its likeliest token.
#pragma once

#include "sampling_row.cuh"

namespace engine::cuda {

constexpr int kCountingThreads = 1024;

// What the workspace holds of a token before its logit: how often it was answered, and whether it was seen at
// all.
constexpr uint32_t kWasSeen = 0x80000000u;

// One block a row.
__global__ void __launch_bounds__(kCountingThreads) count_tokens(SamplingArgs args) {
  const int64_t r = blockIdx.x;
  if (!has_penalties(args, r)) return;
  auto* counts = reinterpret_cast<uint32_t*>(args.workspace + r * args.workspace_stride);
  for (int64_t i = thread_index(); i < args.vocab_size; i += num_threads()) counts[i] = 0;
  __syncthreads();
  const Entries tokens = tokens_of(args, r);
  const int64_t first_answered = tokens.begin + args.prompt_lens[r];
  for (int64_t i = tokens.begin + thread_index(); i < tokens.end; i += num_threads()) {
    const int32_t id = args.token_ids[i];
    if (id < 0 || id >= args.vocab_size) continue;
    atomicOr(&counts[id], kWasSeen);
    if (i >= first_answered) atomicAdd(&counts[id], 1u);
  }
}

__device__ inline float penalised(float x, uint32_t seen, float repetition, float frequency, float presence) {
  if (seen == 0) return x;
  if (repetition != 1.0f) x = fminf(x > 0 ? x / repetition : x * repetition, kLargestFloat);
  const uint32_t times = seen & ~kWasSeen;
  return times == 0 ? x : x - frequency * static_cast<float>(times) - presence;
}

__device__ inline void adjust_chunk(const SamplingArgs& args, const Chunk& chunk) {
  const int64_t r = chunk.row;
  const float* logits = args.logits + r * args.logits_stride;
  float* adjusted = args.workspace + r * args.workspace_stride;
  const int32_t* mask = args.bitmask == nullptr ? nullptr : args.bitmask + r * args.bitmask_stride;
  const bool is_penalised = has_penalties(args, r);
  const float repetition = args.repetition_penalty[r], frequency = args.frequency_penalty[r],
              presence = args.presence_penalty[r];
  for (int64_t i = chunk.begin + thread_index(); i < chunk.end; i += num_threads()) {
    float x = cleaned(logits[i]);
    if (is_penalised) x = penalised(x, __float_as_uint(adjusted[i]), repetition, frequency, presence);
    if (mask != nullptr && !(static_cast<uint32_t>(mask[i / 32]) >> (i % 32) & 1)) x = kRuledOut;
    adjusted[i] = x;
  }
  if (!has_biases(args, r)) return;
  __syncthreads();
  // Every thread has tokens of its own, and adds to each in the order of the list.
  const Entries biases = biases_of(args, r);
  for (int64_t j = biases.begin; j < biases.end; ++j) {
    const int64_t id = args.bias_ids[j];
    if (id < chunk.begin || id >= chunk.end || (id - chunk.begin) % num_threads() != thread_index()) continue;
    adjusted[id] += args.bias_values[j];
  }
}

struct PrepareShared {
  Wide best[kMaxWarps];
};

__global__ void __launch_bounds__(kSamplingThreads) prepare_row(SamplingArgs args, SamplingScratch scratch) {
  auto& shared = *dynamic_shared<PrepareShared>();
  const Chunk chunk(args.vocab_size, scratch.num_chunks);
  const int64_t r = chunk.row;
  if (is_adjusted(args, r)) {
    adjust_chunk(args, chunk);
    __syncthreads();
  }
  float largest = kRuledOut;
  int64_t where = chunk.begin;
  for_tokens(sampled_logits(args, r), chunk.begin, chunk.end, [&](int64_t id, float x) {
    if (x > largest) {
      largest = x;
      where = id;
    }
  });
  const Wide best = max_of_block(rank_of(largest, where), shared.best);
  if (thread_index() == 0) {
    scratch.chunk_best[r * scratch.num_chunks + chunk.index] = best;
    if (chunk.index == 0) scratch.states[r] = SamplingState{};
  }
  // The filters add to bins of zero.
  for (int i = static_cast<int>(chunk.index) * num_threads() + thread_index(); i < kLikelihoodBins;
       i += scratch.num_chunks * num_threads()) {
    scratch.bin_weights[r * kLikelihoodBins + i] = 0;
    scratch.bin_counts[r * kLikelihoodBins + i] = 0;
  }
}

}  // namespace engine::cuda
