// Last part of sampling: the token in whose interval u * total falls when the weights that the filters left are
// laid out by id. Each chunk adds up its weights; the last block to finish finds the chunk, and in it the
// token.
#pragma once

#include "sampling_row.cuh"

namespace engine::cuda {

// Philox4x32-10 (Salmon et al. 2011), first two of the four words: uniform in (0, 1), 53 bits, a function of
// (seed, choice, position) and nothing else.
__device__ inline double uniform(uint64_t seed, uint32_t choice, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = choice,
           c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t n0 = __umulhi(0xCD9E8D57u, c2) ^ c1 ^ k0;
    const uint32_t n2 = __umulhi(0xD2511F53u, c0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57u * c2;
    c3 = 0xD2511F53u * c0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = (static_cast<uint64_t>(c0) << 32 | c1) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

// Which tokens all filters leave, and what they weigh.
struct Kept {
  Likelihood likelihood;
  Wide cut;
  float min_p;

  __device__ Kept(const SamplingArgs& args, const SamplingScratch& scratch, int64_t r, Wide best)
      : likelihood(logit_of(best), args.temperature[r]), cut(scratch.states[r].cut), min_p(args.min_p[r]) {}

  __device__ bool holds(int64_t id, float x) const {
    return rank_of(x, id) >= cut && !(min_p > 0.0f && likelihood.share(x) < min_p);
  }
  __device__ Wide weight(int64_t id, float x) const { return holds(id, x) ? likelihood.weight(x) : Wide{0}; }
};

struct DrawShared {
  Wide sums[kMaxWarps];
  ReachShared reach;
  bool is_last;
};

__global__ void __launch_bounds__(kSamplingThreads) draw_token(SamplingArgs args, SamplingScratch scratch) {
  auto& shared = *dynamic_shared<DrawShared>();
  const Chunk chunk(args.vocab_size, scratch.num_chunks);
  const int64_t r = chunk.row;
  const Wide best = best_of(scratch, r);
  const bool is_ruled_out = logit_of(best) == kRuledOut;
  if (is_ruled_out || is_greedy(args, r)) {
    if (chunk.index == 0 && thread_index() == 0) {
      args.out_ids[r] = is_ruled_out ? -1 : static_cast<int32_t>(id_of(best));
    }
    return;
  }
  const float* logits = sampled_logits(args, r);
  const Kept kept(args, scratch, r, best);
  Wide own = 0;
  for_tokens(logits, chunk.begin, chunk.end, [&](int64_t id, float x) { own += kept.weight(id, x); });
  own = sum_of_block(own, shared.sums);
  Wide* weights = scratch.chunk_weights + r * scratch.num_chunks;
  if (thread_index() == 0) weights[chunk.index] = own;
  if (!is_last_block(&scratch.states[r].num_done[3], scratch.num_chunks, &shared.is_last)) return;

  Wide total = 0;
  for (int c = 0; c < scratch.num_chunks; ++c) total += fresh(weights + c);
  const double u = uniform(static_cast<uint64_t>(args.seeds[r]), static_cast<uint32_t>(args.choices[r]),
                           static_cast<uint64_t>(args.positions[r]));
  // The first running sum that is above u * total is the first that reaches `target`.
  const Wide target = min(total, static_cast<Wide>(u * static_cast<double>(total)) + 1);
  const Reached there =
      find_reached(scratch.num_chunks, target, shared.reach, [&](int c) { return fresh(weights + c); });
  int64_t token = -1;  // a min_p above 1 drops everything
  if (total != 0) {
    const int64_t begin = there.index * static_cast<int64_t>(kSamplingChunk);
    const int64_t end = min(args.vocab_size, begin + kSamplingChunk);
    token =
        begin + find_reached(static_cast<int>(end - begin), target - there.before, shared.reach, [&](int i) {
                  return kept.weight(begin + i, cleaned(logits[begin + i]));
                }).index;
  }
  if (thread_index() == 0) args.out_ids[r] = static_cast<int32_t>(token);
}

}  // namespace engine::cuda
