// Log-probabilities, or logits, of a token of each row and of the likeliest ones: of the model's logits, or
// with `reports_processed` of what the token was drawn from. Each chunk finds its likeliest tokens and its sum
// of exponentials (report_chunks), and one block a row joins them in order (report_rows).
#pragma once

#include "sampling_draw.cuh"
#include "sampling_row.cuh"

namespace engine::cuda {

// What is reported of a token that was just drawn.
struct DrawnScores {
  SamplingArgs args;
  SamplingScratch scratch;

  __device__ int64_t token(int64_t r) const { return args.out_ids[r]; }

  struct Row {
    const float* logits;
    Kept kept;
    float shift, temperature;
    bool is_processed, is_filtered, is_scaled;

    // A shift changes no log-probability, and keeps the digits of small differences.
    __device__ Row(const SamplingArgs& args, const SamplingScratch& scratch, int64_t r)
        : logits(args.logits + r * args.logits_stride), kept(args, scratch, r, best_of(scratch, r)) {
      is_processed = args.reports_processed;
      is_scaled = is_processed && !is_greedy(args, r);
      is_filtered = is_scaled && (has_top_k(args, r) || has_top_p(args, r) || args.min_p[r] > 0.0f);
      if (is_processed) logits = sampled_logits(args, r);
      shift = args.reports_logits ? 0.0f : kept.likelihood.best;
      temperature = args.temperature[r];
    }
    __device__ float score(int64_t id, float x) const {
      if (!is_scaled) return x;
      if (is_filtered && !kept.holds(id, x)) return kRuledOut;
      return cleaned((x - shift) / temperature);
    }
  };
  __device__ Row row(int64_t r) const { return Row(args, scratch, r); }
};

// What is reported of a token that was known before.
struct KnownScores {
  ScoringArgs args;
  SamplingScratch scratch;

  __device__ int64_t token(int64_t r) const { return args.token_ids[r]; }

  struct Row {
    const float* logits;
    __device__ float score(int64_t, float x) const { return x; }
  };
  __device__ Row row(int64_t r) const { return {args.logits + r * args.logits_stride}; }
};

// Rows of which nothing is reported have -1.
template <typename Scores>
__device__ int num_reported(const Scores& scores, int64_t r) {
  const int64_t token = scores.token(r);
  if (token < 0 || token >= scores.args.vocab_size) return -1;
  const int64_t most = min(scores.args.top_stride, scores.args.vocab_size);
  return static_cast<int>(min(static_cast<int64_t>(scores.args.num_top_logprobs[r]), most));
}

struct ReportShared {
  Wide ranks[kMaxWarps];
};

template <typename Scores>
__global__ void __launch_bounds__(kSamplingThreads) report_chunks(Scores scores) {
  auto& shared = *dynamic_shared<ReportShared>();
  const SamplingScratch& scratch = scores.scratch;
  const Chunk chunk(scores.args.vocab_size, scratch.num_chunks);
  const int num_top = num_reported(scores, chunk.row);
  if (num_top < 0) return;
  const auto row = scores.row(chunk.row);
  // The best of this thread's tokens that rank below `bound`.
  const auto best_below = [&](Wide bound) {
    Wide best = 0;
    for_tokens(row.logits, chunk.begin, chunk.end, [&](int64_t id, float x) {
      const Wide rank = rank_of(row.score(id, x), id);
      if (rank < bound) best = max(best, rank);
    });
    return best;
  };
  Wide mine = best_below(~Wide{0});
  const Wide best = max_of_block(mine, shared.ranks);
  const float largest = logit_of(best);
  const int64_t at = chunk.row * scratch.num_chunks + chunk.index;

  // Whole numbers, as weights are: how tokens fall to threads follows from where the row starts.
  Wide sum = 0;
  if (largest != kRuledOut && !scores.args.reports_logits) {
    for_tokens(row.logits, chunk.begin, chunk.end, [&](int64_t id, float x) {
      sum += static_cast<Wide>(expf(row.score(id, x) - largest) * kLikeliestWeight + 0.5f);
    });
  }
  sum = sum_of_block(sum, shared.ranks);
  if (thread_index() == 0) {
    scratch.chunk_sums[at] = static_cast<double>(sum) / kLikeliestWeight;
    scratch.chunk_max[at] = largest;
  }
  Wide next = best;
  for (int place = 0; place < num_top; ++place) {
    if (thread_index() == 0) scratch.chunk_top[at * scratch.num_top + place] = next;
    if (place + 1 == num_top) break;
    if (mine == next) mine = best_below(next);
    next = max_of_block(mine, shared.ranks);
  }
}

template <typename Scores>
__global__ void __launch_bounds__(kSamplingThreads) report_rows(Scores scores) {
  auto& shared = *dynamic_shared<ReportShared>();
  const SamplingScratch& scratch = scores.scratch;
  const auto& args = scores.args;
  const int64_t r = blockIdx.x;
  const int num_top = num_reported(scores, r);
  if (num_top < 0) return;
  const int64_t first = r * scratch.num_chunks;
  float largest = kRuledOut;
  for (int c = 0; c < scratch.num_chunks; ++c) largest = fmaxf(largest, scratch.chunk_max[first + c]);
  double normaliser = 0;
  if (!args.reports_logits && largest != kRuledOut) {
    double sum = 0;
    for (int c = 0; c < scratch.num_chunks; ++c) {
      // A double difference of floats: no infinity comes of two finite ones.
      sum += scratch.chunk_sums[first + c] * exp(static_cast<double>(scratch.chunk_max[first + c]) - largest);
    }
    normaliser = static_cast<double>(largest) + log(sum);
  }
  const auto reported = [&](float score) {
    return static_cast<float>(static_cast<double>(score) - normaliser);
  };
  if (thread_index() == 0) {
    const int64_t token = scores.token(r);
    const auto row = scores.row(r);
    args.out_logprobs[r] = reported(row.score(token, cleaned(row.logits[token])));
  }
  const Wide* top = scratch.chunk_top + first * scratch.num_top;
  Wide bound = ~Wide{0};
  for (int place = 0; place < num_top; ++place) {
    Wide best = 0;
    for (int c = 0; c < scratch.num_chunks; ++c) {
      for (int i = thread_index(); i < num_top; i += num_threads()) {
        const Wide rank = top[static_cast<int64_t>(c) * scratch.num_top + i];
        if (rank < bound) best = max(best, rank);
      }
    }
    bound = max_of_block(best, shared.ranks);
    if (thread_index() != 0) continue;
    args.top_ids[r * args.top_stride + place] = static_cast<int32_t>(id_of(bound));
    args.top_logprobs[r * args.top_stride + place] = reported(logit_of(bound));
  }
}

}  // namespace engine::cuda
