// What the sampling kernels know of a row: its logits, how they rank and what they weigh.
//
// Everything that decides is an integer. A token's rank is its logit's bits, ordered, above its id's
// complement: larger logits rank higher and of equal ones the lower id, so that no two tokens rank alike and a
// filter is one comparison. Weights are integers too, and their sums exact, in whichever order blocks come to
// add them.
#pragma once

#include "block.cuh"
#include "sampling_args.h"
#include "simt.h"

namespace engine::cuda {

constexpr int kSamplingThreads = 256;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kRuledOut = -kInfinity;

// NaN becomes -infinity and +infinity the largest number, so that a broken logit can neither win silently nor
// turn the others into NaN.
__device__ inline float cleaned(float x) { return fminf(fmaxf(x, kRuledOut), kLargestFloat); }

__device__ inline Wide rank_of(float x, int64_t id) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  const uint32_t ordered = (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
  return static_cast<Wide>(ordered) << 32 | ~static_cast<uint32_t>(id);
}
__device__ inline int64_t id_of(Wide rank) { return ~static_cast<uint32_t>(rank); }
__device__ inline float logit_of(Wide rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float((ordered & 0x80000000u) ? ordered & 0x7fffffffu : ~ordered);
}

// Calls visit(id, logit) for the tokens of [begin, end), shared among the block's threads, each of which sees
// rising ids. Rows may start anywhere.
template <typename Visit>
__device__ void for_tokens(const float* row, int64_t begin, int64_t end, Visit visit) {
  const int64_t off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row + begin) / sizeof(float) % 4);
  const int64_t aligned = min(end, begin + (4 - off) % 4);
  const int64_t tail = aligned + (end - aligned) / 4 * 4;
  const int64_t head = begin + thread_index();
  if (head < aligned) visit(head, cleaned(row[head]));
#pragma unroll 2
  for (int64_t i = aligned + 4 * thread_index(); i < tail; i += 4 * num_threads()) {
    const float4 four = load_vec<float4>(row + i);
    visit(i, cleaned(four.x));
    visit(i + 1, cleaned(four.y));
    visit(i + 2, cleaned(four.z));
    visit(i + 3, cleaned(four.w));
  }
  if (tail + thread_index() < end) visit(tail + thread_index(), cleaned(row[tail + thread_index()]));
}

// The entries of a row in a list of `count`, wherever its bounds point.
struct Entries {
  int64_t begin, end;

  __device__ Entries(const int64_t* indptr, int64_t r, int64_t count)
      : begin(max(int64_t{0}, indptr[r])), end(min(count, indptr[r + 1])) {}
};
__device__ inline Entries tokens_of(const SamplingArgs& args, int64_t r) {
  return {args.token_indptr, r, args.num_token_ids};
}
__device__ inline Entries biases_of(const SamplingArgs& args, int64_t r) {
  return {args.bias_indptr, r, args.num_biases};
}

__device__ inline bool has_penalties(const SamplingArgs& args, int64_t r) {
  const Entries tokens = tokens_of(args, r);
  return tokens.begin < tokens.end && (args.repetition_penalty[r] != 1.0f ||
                                       args.frequency_penalty[r] != 0.0f || args.presence_penalty[r] != 0.0f);
}
__device__ inline bool has_biases(const SamplingArgs& args, int64_t r) {
  const Entries biases = biases_of(args, r);
  return biases.begin < biases.end;
}
// Whether the logits that are sampled from differ from those of the model: then they lie in the workspace.
__device__ inline bool is_adjusted(const SamplingArgs& args, int64_t r) {
  return args.bitmask != nullptr || has_biases(args, r) || has_penalties(args, r);
}
__device__ inline const float* sampled_logits(const SamplingArgs& args, int64_t r) {
  return is_adjusted(args, r) ? args.workspace + r * args.workspace_stride
                              : args.logits + r * args.logits_stride;
}

__device__ inline bool is_greedy(const SamplingArgs& args, int64_t r) {
  return args.temperature[r] < kGreedyTemperature;
}
__device__ inline bool has_top_k(const SamplingArgs& args, int64_t r) {
  return !is_greedy(args, r) && args.top_k[r] > 0 && args.top_k[r] < args.vocab_size;
}
__device__ inline bool has_top_p(const SamplingArgs& args, int64_t r) {
  return !is_greedy(args, r) && args.top_p[r] < 1.0f;
}

// The row and chunk of a block; chunks of a row are neighbours.
struct Chunk {
  int64_t row, index, begin, end;

  __device__ Chunk(int64_t vocab_size, int num_chunks) {
    row = blockIdx.x / num_chunks;
    index = blockIdx.x % num_chunks;
    begin = index * kSamplingChunk;
    end = min(vocab_size, begin + kSamplingChunk);
  }
};

// The rank of the likeliest token, once all chunks have theirs.
__device__ inline Wide best_of(const SamplingScratch& scratch, int64_t r) {
  Wide best = 0;
  for (int c = 0; c < scratch.num_chunks; ++c) best = max(best, scratch.chunk_best[r * scratch.num_chunks + c]);
  return best;
}

// Likelihoods as powers of two, relative to the likeliest token. Never rising with falling logits, so that bins
// are ranges of ranks.
struct Likelihood {
  float best, rate;

  __device__ Likelihood(float best_, float temperature) : best(best_), rate(kLog2E / temperature) {}

  __device__ float octaves(float x) const { return (x - best) * rate; }
  __device__ int bin(float x) const {
    return static_cast<int>(fminf(octaves(x) * -kBinsPerOctave, kLikelihoodBins - 1));
  }
  // 1 for the likeliest.
  __device__ float share(float x) const { return exp2f(octaves(x)); }
  __device__ Wide weight(float x) const { return static_cast<Wide>(share(x) * kLikeliestWeight + 0.5f); }
};

// A 64-bit sum in two words, whose atomic additions shared memory has in hardware.
__device__ inline void add_wide(uint32_t* low, uint32_t* high, Wide value) {
  const uint32_t part = static_cast<uint32_t>(value);
  const uint32_t carry = part > ~atomicAdd(low, part);
  const uint32_t rest = static_cast<uint32_t>(value >> 32) + carry;
  if (rest != 0) atomicAdd(high, rest);
}

}  // namespace engine::cuda
