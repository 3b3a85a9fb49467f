// Second part of sampling: where top-k and top-p cut, without sorting.
//
// Each filter keeps the tokens of highest rank until their count, or their weight, reaches a target. One pass
// puts counts and weights of tokens in bins by likelihood (count_bins), which tells the bin in which a filter
// cuts. One pass a filter (find_cut) lists the tokens of that bin, mostly some hundred; the last block to
// finish narrows the range of ranks in them down to the token at which the target is reached. Where a bin holds
// more than the list, as with logits that are all alike, that block reads the row instead.
#pragma once

#include "sampling_row.cuh"

namespace engine::cuda {

// What the two filters count; both in the same bins.
struct ByCount {
  static constexpr int kTurn = 1;
  __device__ static bool is_on(const SamplingArgs& args, int64_t r) { return has_top_k(args, r); }
  __device__ static Wide measure(const Likelihood&, float) { return 1; }
};
struct ByWeight {
  static constexpr int kTurn = 2;
  __device__ static bool is_on(const SamplingArgs& args, int64_t r) { return has_top_p(args, r); }
  __device__ static Wide measure(const Likelihood& likelihood, float x) { return likelihood.weight(x); }
};

// Finds the bin in which the next filter cuts. By all threads of one block, when all bins are there.
template <typename Bins>
__device__ void find_bin(SamplingState& state, Wide target, ReachShared& shared, Bins bins) {
  const Reached reached = find_reached(kLikelihoodBins, target, shared, bins);
  if (thread_index() != 0) return;
  state.target = target;
  state.bin = reached.index < 0 ? kLikelihoodBins - 1 : reached.index;
  state.before = reached.before;
  state.num_candidates = 0;
}

// `kept_bins` are the first bins, whose tokens top-k left, those of the last one weighing `last_weight`.
__device__ inline void find_bin_of_weight(const SamplingArgs& args, const SamplingScratch& scratch, int64_t r,
                                          int kept_bins, Wide last_weight, Wide* sums, ReachShared& reach) {
  const Wide* weights = scratch.bin_weights + r * kLikelihoodBins;
  const auto weight_of = [&](int bin) {
    return bin + 1 < kept_bins ? fresh(weights + bin) : bin + 1 == kept_bins ? last_weight : Wide{0};
  };
  Wide total = 0;
  for (int bin = thread_index(); bin < kLikelihoodBins; bin += num_threads()) total += weight_of(bin);
  total = sum_of_block(total, sums);
  const double wanted = ceil(static_cast<double>(args.top_p[r]) * static_cast<double>(total));
  const Wide target = wanted < 1.0 ? 1 : min(total, static_cast<Wide>(wanted));
  find_bin(scratch.states[r], target, reach, weight_of);
}

struct CountBinsShared {
  uint32_t counts[kLikelihoodBins], low[kLikelihoodBins], high[kLikelihoodBins];
  Wide sums[kMaxWarps];
  ReachShared reach;
  bool is_last;
};

__global__ void __launch_bounds__(kSamplingThreads) count_bins(SamplingArgs args, SamplingScratch scratch) {
  auto& shared = *dynamic_shared<CountBinsShared>();
  const Chunk chunk(args.vocab_size, scratch.num_chunks);
  const int64_t r = chunk.row;
  const bool by_count = has_top_k(args, r), by_weight = has_top_p(args, r);
  if (!by_count && !by_weight) return;
  const Wide best = best_of(scratch, r);
  if (logit_of(best) == kRuledOut) return;
  for (int bin = thread_index(); bin < kLikelihoodBins; bin += num_threads()) {
    shared.counts[bin] = shared.low[bin] = shared.high[bin] = 0;
  }
  __syncthreads();
  const Likelihood likelihood(logit_of(best), args.temperature[r]);
  for_tokens(sampled_logits(args, r), chunk.begin, chunk.end, [&](int64_t, float x) {
    const int bin = likelihood.bin(x);
    if (by_count) atomicAdd(&shared.counts[bin], 1u);
    if (!by_weight) return;
    const Wide weight = likelihood.weight(x);
    if (weight != 0) add_wide(&shared.low[bin], &shared.high[bin], weight);
  });
  __syncthreads();
  for (int bin = thread_index(); bin < kLikelihoodBins; bin += num_threads()) {
    const Wide weight = static_cast<Wide>(shared.high[bin]) << 32 | shared.low[bin];
    if (weight != 0) atomicAdd(scratch.bin_weights + r * kLikelihoodBins + bin, weight);
    if (shared.counts[bin] != 0) atomicAdd(scratch.bin_counts + r * kLikelihoodBins + bin, shared.counts[bin]);
  }
  SamplingState& state = scratch.states[r];
  if (!is_last_block(&state.num_done[0], scratch.num_chunks, &shared.is_last)) return;
  if (by_count) {
    const uint32_t* counts = scratch.bin_counts + r * kLikelihoodBins;
    find_bin(state, args.top_k[r], shared.reach, [&](int bin) { return Wide{fresh(counts + bin)}; });
  } else {
    find_bin_of_weight(args, scratch, r, kLikelihoodBins + 1, 0, shared.sums, shared.reach);
  }
}

// Tokens of one bin above a cut: of a list, or where it does not hold them all of the row. visit(rank).
struct Candidates {
  const Wide* list;
  uint32_t count;
  const float* logits;
  int64_t vocab_size;
  Likelihood likelihood;
  int bin;
  Wide cut;

  template <typename Visit>
  __device__ void visit_all(Visit visit) const {
    if (count <= kMaxCandidates) {
      for (uint32_t i = thread_index(); i < count; i += num_threads()) visit(fresh(list + i));
      return;
    }
    for_tokens(logits, 0, vocab_size, [&](int64_t id, float x) {
      if (likelihood.bin(x) != bin) return;
      const Wide rank = rank_of(x, id);
      if (rank >= cut) visit(rank);
    });
  }
};

// What a range of ranks is cut into at a time.
constexpr int kPartBits = 11;
constexpr int kParts = 1 << kPartBits;

struct NarrowShared {
  uint32_t low[kParts], high[kParts];
  Wide joined[kMaxWarps];
  ReachShared reach;
};

// The rank down to which candidates are kept, from the highest on, for their measure to reach `target`.
template <typename Filter>
__device__ Wide narrow(const Candidates& candidates, Wide target, NarrowShared& shared) {
  Wide lowest = 0, highest = ~Wide{0};
  while (true) {
    Wide least = ~Wide{0}, most = 0;
    candidates.visit_all([&](Wide rank) {
      if (rank < lowest || rank > highest) return;
      least = min(least, rank);
      most = max(most, rank);
    });
    least = min_of_block(least, shared.joined);
    most = max_of_block(most, shared.joined);
    if (least >= most) return least;
    // They agree in all bits above those of the parts.
    const int num_bits = 64 - __clzll(static_cast<long long>(least ^ most));
    const int shift = num_bits > kPartBits ? num_bits - kPartBits : 0;
    for (int part = thread_index(); part < kParts; part += num_threads())
      shared.low[part] = shared.high[part] = 0;
    __syncthreads();
    candidates.visit_all([&](Wide rank) {
      if (rank < lowest || rank > highest) return;
      const int part = static_cast<int>(rank >> shift & (kParts - 1));
      add_wide(&shared.low[part], &shared.high[part], Filter::measure(candidates.likelihood, logit_of(rank)));
    });
    __syncthreads();
    const Reached reached = find_reached(kParts, target, shared.reach, [&](int i) {
      const int part = kParts - 1 - i;
      return static_cast<Wide>(shared.high[part]) << 32 | shared.low[part];
    });
    if (reached.index < 0) return least;
    const Wide part = static_cast<Wide>(kParts - 1 - reached.index);
    target -= reached.before;
    lowest = ((most >> shift & ~static_cast<Wide>(kParts - 1)) | part) << shift;
    highest = lowest | ((Wide{1} << shift) - 1);
  }
}

// Candidates that one block lists; a chunk that is not of one likelihood has some dozens.
constexpr int kMaxBlockCandidates = 1024;

struct FindCutShared {
  union {
    Wide list[kMaxBlockCandidates];
    NarrowShared narrow;
  };
  uint32_t count, first;
  bool is_last;
};

// Turn 1 cuts by count, turn 2 by weight.
template <typename Filter>
__global__ void __launch_bounds__(kSamplingThreads, 5) find_cut(SamplingArgs args, SamplingScratch scratch) {
  auto& shared = *dynamic_shared<FindCutShared>();
  const Chunk chunk(args.vocab_size, scratch.num_chunks);
  const int64_t r = chunk.row;
  if (!Filter::is_on(args, r)) return;
  const Wide best = best_of(scratch, r);
  if (logit_of(best) == kRuledOut) return;
  SamplingState& state = scratch.states[r];
  const Likelihood likelihood(logit_of(best), args.temperature[r]);
  const float* logits = sampled_logits(args, r);
  Wide* list = scratch.candidates + r * kMaxCandidates;
  const int bin = state.bin;
  const Wide cut = state.cut;

  if (thread_index() == 0) shared.count = 0;
  __syncthreads();
  for_tokens(logits, chunk.begin, chunk.end, [&](int64_t id, float x) {
    if (likelihood.bin(x) != bin) return;
    const Wide rank = rank_of(x, id);
    if (rank < cut) return;
    const uint32_t place = atomicAdd(&shared.count, 1u);
    if (place < kMaxBlockCandidates) shared.list[place] = rank;
  });
  __syncthreads();
  if (thread_index() == 0 && shared.count != 0) {
    // Too many for the block are too many for the row.
    const uint32_t count = shared.count <= kMaxBlockCandidates ? shared.count : kMaxCandidates + 1;
    shared.first = atomicAdd(&state.num_candidates, count);
  }
  __syncthreads();
  if (shared.count <= kMaxBlockCandidates) {
    for (uint32_t i = thread_index(); i < shared.count; i += num_threads()) {
      if (shared.first + i < kMaxCandidates) list[shared.first + i] = shared.list[i];
    }
  }
  if (!is_last_block(&state.num_done[Filter::kTurn], scratch.num_chunks, &shared.is_last)) return;

  const Candidates candidates{list, fresh(&state.num_candidates), logits, args.vocab_size, likelihood, bin,
                              cut};
  const Wide lowest = narrow<Filter>(candidates, state.target - state.before, shared.narrow);
  if (thread_index() == 0) state.cut = lowest;
  if (Filter::kTurn == 2 || !has_top_p(args, r)) return;
  Wide kept = 0;
  candidates.visit_all([&](Wide rank) {
    if (rank >= lowest) kept += likelihood.weight(logit_of(rank));
  });
  kept = sum_of_block(kept, shared.narrow.joined);
  find_bin_of_weight(args, scratch, r, bin + 1, kept, shared.narrow.joined, shared.narrow.reach);
}

}  // namespace engine::cuda
