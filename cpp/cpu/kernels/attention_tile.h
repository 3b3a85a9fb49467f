// Register tiles of attention: some pairs of query row and head against the keys and values of one split.
// The order of every sum is that of paged_attention.cc. Include only from files in this folder.
#pragma once

#include "cpu/kernels/attention_factors.h"
#include "engine/kernel_args.h"

namespace engine::cpu {
namespace ENGINE_ISA {

constexpr int kSplit = static_cast<int>(kAttentionSplit);
constexpr int kGroup = 16;  // tokens a vector; block sizes are multiples of it
constexpr int kMaxHeadDim = 256;
constexpr int kTile = static_cast<int>(kAttentionTilePairs);

// Register tiles: kMaxRows pairs against as many vectors as kAccumulators leaves room for.
#if ENGINE_ISA_avx512
constexpr int kMaxRows = 8, kAccumulators = 16;
#else
constexpr int kMaxRows = 4, kAccumulators = 4;
#endif
constexpr int columns_for(int rows) {
  const int columns = kAccumulators / rows;
  return columns > 4 ? 4 : columns < 1 ? 1 : columns;
}

ENGINE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ENGINE_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename Element>
constexpr int kLine = 64 / static_cast<int>(sizeof(Element));  // elements a cache line

constexpr float kMinusInfinity = -__builtin_inff();

// Tokens of a split, relative to its begin; empty where end <= begin.
struct Range {
  int64_t begin, end;
};

// Where the keys and values of each group of tokens of one split lie, for one KV head.
template <typename Element>
struct Split {
  int64_t begin;  // absolute position
  const Element* keys[kSplit / kGroup];
  const Element* values[kSplit / kGroup];
  const float* scales[kSplit / kGroup];  // of keys; those of values lie S behind. Only of codes
};

// What register tiles of one split work in.
struct Scratch {
  alignas(64) float scores[kMaxRows][kSplit];  // then weights
  alignas(64) float values[kMaxRows][kMaxHeadDim];
};

// Blocks lie anywhere, so the hardware does not guess the next one. Scoring a group of keys prefetches
// its values, and adding values prefetches the keys of the next split: a line is asked for thousands of
// cycles before it is used. A line holds as many rows of a block of kGroup tokens:
template <typename Element>
constexpr int kRowsPerLine = kLine<Element> / kGroup;

// Those of the first split, for which no split before it has asked.
template <typename Element>
ENGINE_INLINE void prefetch_keys(const PagedAttentionArgs& args, const Split<Element>& split, int64_t groups) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t d = 0; d < args.D; d += kRowsPerLine<Element>) {
      __builtin_prefetch(split.keys[group] + d * args.S);
    }
  }
}

// Scores of R pairs for C groups of tokens.
template <int R, int C, typename Element>
ENGINE_INLINE void score_groups(const PagedAttentionArgs& args, const float (*query)[kMaxHeadDim],
                                const Split<Element>& split, int64_t group, Scratch& scratch) {
  Vec16 sum[R][C];
  if constexpr (kIsQuantized<Element>) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(split.scales[group + c] + args.S);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  constexpr int kSteps = 4;
  for (int64_t d = 0; d < args.D; d += kSteps) {
#pragma GCC unroll 4
    for (int i = 0; i < kSteps; i += kRowsPerStep<Element>) {
      const Element* key[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        key[c] = split.keys[group + c] + (d + i) * args.S;
        if (i % kRowsPerLine<Element> == 0) __builtin_prefetch(split.values[group + c] + (d + i) * kGroup);
      }
      add_step(query, d + i, key, args.S, sum);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec16 scores = mul(sum[r][c], set1(args.scale));
      if constexpr (kIsQuantized<Element>) scores = mul(scores, load(split.scales[group + c]));
      store(&scratch.scores[r][(group + c) * kGroup], scores);
    }
  }
}

template <int R, typename Element>
ENGINE_INLINE void score(const PagedAttentionArgs& args, const float (*query)[kMaxHeadDim],
                         const Split<Element>& split, Range groups, Scratch& scratch) {
  constexpr int C = columns_for(R);
  int64_t group = groups.begin;
  for (; group + C <= groups.end; group += C) score_groups<R, C>(args, query, split, group, scratch);
  for (; group < groups.end; ++group) score_groups<R, 1>(args, query, split, group, scratch);
}

// Turns a pair's scores into weights e^(score - maximum), zero outside `seen`, as factors of values.
template <typename Element>
ENGINE_INLINE void weigh(float* scores, Range seen, float softcap, float& maximum, float& sum) {
  const int64_t begin = seen.begin / kGroup * kGroup;
  const int64_t end = (seen.end + kGroup - 1) / kGroup * kGroup;
  if (softcap > 0) {
    for (int64_t i = begin; i < end; i += kGroup) {
      store(scores + i, mul(set1(softcap), tanh(div(load(scores + i), set1(softcap)))));
    }
  }
  // Slots that no token was written to may hold anything, NaN included.
  for (int64_t i = begin; i < seen.begin; ++i) scores[i] = kMinusInfinity;
  for (int64_t i = seen.end; i < end; ++i) scores[i] = kMinusInfinity;
  Vec16 lane_maxima = set1(kMinusInfinity);
  for (int64_t i = begin; i < end; i += kGroup) lane_maxima = max(lane_maxima, load(scores + i));
  maximum = reduce_max(lane_maxima);
  Vec16 lane_sums = zero();
  for (int64_t i = begin; i < end; i += kGroup) {
    const Vec16 weight = exp(sub(load(scores + i), set1(maximum)));
    lane_sums = add(lane_sums, weight);
    store_factors<Element>(scores, i, weight);
  }
  sum = reduce_add(lane_sums);
}

// Moves the scales of values into the weights of those that are seen.
template <typename Element>
ENGINE_INLINE void scale_weights(const Split<Element>& split, Range seen, int64_t S, float* weights) {
  if constexpr (kIsQuantized<Element>) {
    for (int64_t group = seen.begin / kGroup; group * kGroup < seen.end; ++group) {
      float* of_group = weights + group * kGroup;
      store(of_group, mul(load(of_group), load(split.scales[group] + S)));
    }
  }
}

// Adds the weighted values of `tokens`, which all R pairs see, for C vectors of the head dimension.
template <int R, int C, typename Element>
ENGINE_INLINE void add_value_columns(const PagedAttentionArgs& args, const Split<Element>& split,
                                     const Split<Element>& next, Range tokens, int64_t column,
                                     const float (*weights)[kSplit], float (*values)[kMaxHeadDim]) {
  Vec16 sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = load(&values[r][column + c * 16]);
  }
  for (int64_t token = tokens.begin; token < tokens.end;) {
    const int64_t group = token / kGroup;
    const int64_t stop = least((group + 1) * kGroup, tokens.end);
    const Element* value = split.values[group] + token % kGroup * args.D + column;
    if constexpr (kIsQuantized<Element>) __builtin_prefetch(next.scales[group]);
    const Element* ahead = next.keys[group] + (column + token % kGroup * C) * args.S;
    constexpr int kStep = kRowsPerStep<Element>;
    while (token < stop) {
      const Element* x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) x[c] = value + c * 16;
#pragma GCC unroll 8
      for (int c = 0; c < kStep * C; c += kRowsPerLine<Element>) __builtin_prefetch(ahead + c * args.S);
      // Only a single pair has tokens whose neighbour it does not see.
      const bool is_alone = R == 1 && kStep == 2 && (token % 2 == 1 || token + 1 == stop);
      if (is_alone) {
        add_row(weights, token, x, sum);
      } else {
        add_step(weights, token, x, args.D, sum);
      }
      const int64_t count = is_alone ? 1 : kStep;
      token += count;
      value += count * args.D;
      ahead += count * C * args.S;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(&values[r][column + c * 16], sum[r][c]);
  }
}

template <int R, typename Element>
ENGINE_INLINE void add_values(const PagedAttentionArgs& args, const Split<Element>& split,
                              const Split<Element>& next, Range tokens, const float (*weights)[kSplit],
                              float (*values)[kMaxHeadDim]) {
  constexpr int C = columns_for(R);
  if (tokens.end <= tokens.begin) return;
  int64_t column = 0;
  for (; column + C * 16 <= args.D; column += C * 16) {
    add_value_columns<R, C>(args, split, next, tokens, column, weights, values);
  }
  for (; column < args.D; column += 16) {
    add_value_columns<R, 1>(args, split, next, tokens, column, weights, values);
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
