// Attention over a paged cache, for any mix of prefill and decode rows; or, not causal, for encoders.
//
// The order of every sum is part of the interface: a row's output depends on its query, on the keys
// and values that it sees, and on nothing else, to the last bit.
//  - Keys are walked in splits of kSplit tokens, at absolute positions that are multiples of it.
//  - In a split: scores are summed over the head dimension in order, one token a lane; the maximum
//    is exact; the weights' sum has one lane per token mod 16 and reduce_add's tree; values are added
//    token by token, one element of the head dimension a lane.
//  - Splits are merged in order, by merge().
// Tiles of pairs, register tiles and threads only choose which of these chains advance together.
// A pair is one query row and one query head.
#include "cpu/kernels/table.h"
#include "cpu/kernels/vec.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

constexpr int kSplit = 256;
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

ENGINE_INLINE Vec16 load_cache(const float* p) { return load(p); }
ENGINE_INLINE Vec16 load_cache(const uint16_t* p) { return load_bf16(p); }

template <typename Element>
constexpr int kLine = 64 / static_cast<int>(sizeof(Element));  // elements a cache line

constexpr float kMinusInfinity = -__builtin_inff();

// The tile's pairs against one split: where the keys and values of each group of tokens lie.
template <typename Element>
struct Split {
  int64_t begin;  // absolute position
  const Element* keys[kSplit / kGroup];
  const Element* values[kSplit / kGroup];
};

// Tokens of a split that a pair sees, relative to its begin; empty where end <= begin.
struct Range {
  int64_t begin, end;
};

struct Tile {
  int count;
  const float* query[kTile];
  float* out[kTile];
  int64_t position[kTile];
  int64_t newest[kTile];  // the last key that is seen
  float maximum[kTile];
  float sum[kTile];  // of the weights, relative to `maximum`, as `values` are
  alignas(64) float values[kTile][kMaxHeadDim];
};

// What register tiles of one split work in.
struct Scratch {
  alignas(64) float scores[kMaxRows][kSplit];  // then weights
  alignas(64) float values[kMaxRows][kMaxHeadDim];
};

// What a register tile prefetches while it computes: the groups that are read next. Blocks lie
// anywhere, so the hardware does not guess them.
template <typename Element, int C>
struct Ahead {
  const Element* groups[C];
  int64_t stride;
};

// Scores of R pairs for C groups of tokens.
template <int R, int C, typename Element>
ENGINE_INLINE void score_groups(const PagedAttentionArgs& args, const float* const* query,
                                const Element* const* keys, int64_t group, const Ahead<Element, C>& ahead,
                                Scratch& scratch) {
  Vec16 sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  for (int64_t d = 0; d < args.D; ++d) {
    Vec16 key[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      key[c] = load_cache(keys[group + c] + d * args.S);
      __builtin_prefetch(ahead.groups[c] + d * ahead.stride);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec16 x = set1(query[r][d]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(x, key[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      store(&scratch.scores[r][(group + c) * kGroup], mul(sum[r][c], set1(args.scale)));
    }
  }
}

template <int R, typename Element>
ENGINE_INLINE void score(const PagedAttentionArgs& args, const float* const* query, const Split<Element>& split,
                         Range groups, Scratch& scratch) {
  constexpr int C = columns_for(R);
  int64_t group = groups.begin;
  for (; group + C <= groups.end; group += C) {
    Ahead<Element, C> ahead;
    const bool is_last = group + C >= groups.end;
    for (int c = 0; c < C; ++c) {
      ahead.groups[c] = is_last ? split.values[least(groups.begin + c, groups.end - 1)]
                                : split.keys[least(group + C + c, groups.end - 1)];
    }
    ahead.stride = is_last ? kGroup : args.S;
    score_groups<R, C>(args, query, split.keys, group, ahead, scratch);
  }
  for (; group < groups.end; ++group) {
    const Ahead<Element, 1> ahead = {{split.values[groups.begin]}, kGroup};
    score_groups<R, 1>(args, query, split.keys, group, ahead, scratch);
  }
}

// Turns a pair's scores into weights e^(score - maximum), zero outside `seen`.
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
    store(scores + i, weight);
  }
  sum = reduce_add(lane_sums);
}

// Adds the weighted values of `tokens`, which all R pairs see, for C vectors of the head dimension.
template <int R, int C, typename Element>
ENGINE_INLINE void add_value_columns(const PagedAttentionArgs& args, const Split<Element>& split, Range tokens,
                                     int64_t column, const float (*weights)[kSplit],
                                     float (*values)[kMaxHeadDim]) {
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
    // As Ahead, one row of the next group at a time.
    const int64_t ahead = split.values[least(group + 1, (tokens.end - 1) / kGroup)] - split.values[group];
    for (; token < stop; ++token, value += args.D) {
      Vec16 x[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        x[c] = load_cache(value + c * 16);
        if (c * 16 % kLine<Element> == 0) __builtin_prefetch(value + ahead + c * 16);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec16 weight = set1(weights[r][token]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, x[c], sum[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(&values[r][column + c * 16], sum[r][c]);
  }
}

template <int R, typename Element>
ENGINE_INLINE void add_values(const PagedAttentionArgs& args, const Split<Element>& split, Range tokens,
                              const float (*weights)[kSplit], float (*values)[kMaxHeadDim]) {
  constexpr int C = columns_for(R);
  if (tokens.end <= tokens.begin) return;
  int64_t column = 0;
  for (; column + C * 16 <= args.D; column += C * 16) {
    add_value_columns<R, C>(args, split, tokens, column, weights, values);
  }
  for (; column < args.D; column += 16) add_value_columns<R, 1>(args, split, tokens, column, weights, values);
}

// Joins a split's (maximum, sum, values) to those of the splits before it.
ENGINE_INLINE void merge(Tile& tile, int pair, int64_t D, float maximum, float sum, const float* values) {
  const float joint = tile.maximum[pair] > maximum ? tile.maximum[pair] : maximum;
  const Vec16 before = exp(set1(tile.maximum[pair] - joint));
  const Vec16 added = exp(set1(maximum - joint));
  for (int64_t d = 0; d < D; d += 16) {
    float* joined = &tile.values[pair][d];
    store(joined, fma(load(values + d), added, mul(load(joined), before)));
  }
  // All lanes are equal.
  tile.sum[pair] = reduce_max(fma(set1(sum), added, mul(set1(tile.sum[pair]), before)));
  tile.maximum[pair] = joint;
}

// R pairs of the tile against one split.
template <int R, typename Element>
void attend_pairs(const PagedAttentionArgs& args, Tile& tile, int first, const Split<Element>& split,
                  Scratch& scratch) {
  Range seen[R];
  Range any = {kSplit, 0}, common = {0, kSplit};
  for (int r = 0; r < R; ++r) {
    const int64_t position = tile.position[first + r];
    const int64_t oldest = args.window > 0 ? most(position - args.window + 1, 0) : 0;
    seen[r] = {most(oldest - split.begin, 0), least(tile.newest[first + r] + 1 - split.begin, kSplit)};
    common = {most(common.begin, seen[r].begin), least(common.end, seen[r].end)};
    if (seen[r].begin < seen[r].end) any = {least(any.begin, seen[r].begin), most(any.end, seen[r].end)};
  }
  if (any.end <= any.begin) return;
  score<R>(args, tile.query + first, split, {any.begin / kGroup, (any.end + kGroup - 1) / kGroup}, scratch);
  float maximum[R], sum[R];
  for (int r = 0; r < R; ++r) {
    if (seen[r].end <= seen[r].begin) continue;
    weigh(scratch.scores[r], seen[r], args.softcap, maximum[r], sum[r]);
    for (int64_t d = 0; d < args.D; d += 16) store(&scratch.values[r][d], zero());
    // Values that only some of the pairs see are added pair by pair, so that nobody reads, not even
    // with weight zero, a value that it does not see.
    const int64_t alone_end = common.begin < common.end ? common.begin : seen[r].end;
    add_values<1>(args, split, {seen[r].begin, alone_end}, &scratch.scores[r], &scratch.values[r]);
  }
  if (common.begin < common.end) {
    add_values<R>(args, split, common, scratch.scores, scratch.values);
    for (int r = 0; r < R; ++r) {
      add_values<1>(args, split, {common.end, seen[r].end}, &scratch.scores[r], &scratch.values[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (seen[r].begin < seen[r].end) merge(tile, first + r, args.D, maximum[r], sum[r], scratch.values[r]);
  }
}

template <typename Element>
ENGINE_INLINE void attend_split(const PagedAttentionArgs& args, Tile& tile, const Split<Element>& split,
                                Scratch& scratch) {
  const int num_parts = (tile.count + kMaxRows - 1) / kMaxRows;
  for (int part = 0; part < num_parts; ++part) {
    const int first = tile.count * part / num_parts;
    switch (tile.count * (part + 1) / num_parts - first) {
      case 1: attend_pairs<1>(args, tile, first, split, scratch); break;
      case 2: attend_pairs<2>(args, tile, first, split, scratch); break;
      case 3: attend_pairs<3>(args, tile, first, split, scratch); break;
      case 4: attend_pairs<4>(args, tile, first, split, scratch); break;
#if ENGINE_ISA_avx512
      case 5: attend_pairs<5>(args, tile, first, split, scratch); break;
      case 6: attend_pairs<6>(args, tile, first, split, scratch); break;
      case 7: attend_pairs<7>(args, tile, first, split, scratch); break;
      case 8: attend_pairs<8>(args, tile, first, split, scratch); break;
#endif
    }
  }
}

// Keys and values of KV head g in [oldest, newest], from the split's begin or later on.
template <typename Element>
ENGINE_INLINE void locate(const PagedAttentionArgs& args, const int32_t* block_table, int64_t g, int64_t oldest,
                          int64_t newest, Split<Element>& split) {
  const int64_t begin = most(oldest, split.begin) / kGroup * kGroup;
  const int64_t end = least(newest + 1, split.begin + kSplit);
  for (int64_t token = begin; token < end; token += kGroup) {
    const int64_t block_id = block_table[token / args.S];
    const int64_t offset = token % args.S;
    const int64_t group = (token - split.begin) / kGroup;
    split.keys[group] = static_cast<const Element*>(args.k_cache) + block_id * args.k_block_stride +
                        g * args.D * args.S + offset;
    split.values[group] = static_cast<const Element*>(args.v_cache) + block_id * args.v_block_stride +
                          (g * args.S + offset) * args.D;
  }
}

// The last key that the query at `position` sees.
ENGINE_INLINE int64_t newest_key(const PagedAttentionArgs& args, int64_t position, int64_t kv_len) {
  if (args.is_causal) return position;
  return args.window > 0 ? least(position + args.window, kv_len) - 1 : kv_len - 1;
}

ENGINE_INLINE void open_tile(const PagedAttentionArgs& args, int64_t b, int64_t g, int64_t first_pair,
                             int64_t num_pairs, Tile& tile) {
  const int64_t heads_per_group = args.H / args.G;
  const int64_t first_row = args.cu_seqlens_q[b];
  const int64_t num_rows = args.cu_seqlens_q[b + 1] - first_row;
  tile.count = static_cast<int>(num_pairs);
  for (int i = 0; i < tile.count; ++i) {
    const int64_t row = (first_pair + i) / heads_per_group;
    const int64_t head = g * heads_per_group + (first_pair + i) % heads_per_group;
    tile.query[i] = args.q + (first_row + row) * args.q_stride + head * args.D;
    tile.out[i] = args.out + (first_row + row) * args.out_stride + head * args.D;
    tile.position[i] = args.kv_lens[b] - num_rows + row;
    tile.newest[i] = newest_key(args, tile.position[i], args.kv_lens[b]);
    tile.maximum[i] = args.sinks == nullptr ? kMinusInfinity : args.sinks[head];
    tile.sum[i] = args.sinks == nullptr ? 0.0f : 1.0f;
    for (int64_t d = 0; d < args.D; d += 16) store(&tile.values[i][d], zero());
  }
}

ENGINE_INLINE void close_tile(const Tile& tile, int64_t D) {
  for (int i = 0; i < tile.count; ++i) {
    const Vec16 sum = set1(tile.sum[i]);
    for (int64_t d = 0; d < D; d += 16) store(tile.out[i] + d, div(load(&tile.values[i][d]), sum));
  }
}

// The sequence that a tile belongs to: the last one that starts at or before it.
ENGINE_INLINE int64_t find_sequence(const PagedAttentionArgs& args, int64_t tile) {
  int64_t low = 0, high = args.B;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_attention_tile(args.cu_seqlens_q, middle, args.H / args.G) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Element>
ENGINE_INLINE void attend(const PagedAttentionArgs& args, int64_t item) {
  const int64_t g = item % args.G;
  const int64_t tile_index = item / args.G;
  const int64_t heads_per_group = args.H / args.G;
  const int64_t b = find_sequence(args, tile_index);
  const int64_t num_pairs = (args.cu_seqlens_q[b + 1] - args.cu_seqlens_q[b]) * heads_per_group;
  const int64_t first_pair =
      (tile_index - first_attention_tile(args.cu_seqlens_q, b, heads_per_group)) * kAttentionTilePairs;
  if (first_pair >= num_pairs) return;

  Tile tile;
  open_tile(args, b, g, first_pair, least(kAttentionTilePairs, num_pairs - first_pair), tile);
  const int64_t newest = tile.newest[tile.count - 1];
  const int64_t oldest = args.window > 0 ? most(tile.position[0] - args.window + 1, 0) : 0;
  Scratch scratch;
  Split<Element> split;
  for (split.begin = oldest / kSplit * kSplit; split.begin <= newest; split.begin += kSplit) {
    locate(args, args.block_tables + b * args.block_tables_stride, g, oldest, newest, split);
    attend_split(args, tile, split, scratch);
  }
  close_tile(tile, args.D);
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (args.cache_is_bf16) {
      attend<uint16_t>(args, item);
    } else {
      attend<float>(args, item);
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
