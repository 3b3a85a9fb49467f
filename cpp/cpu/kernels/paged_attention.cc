// Attention over a paged cache, for any mix of prefill and decode rows; or, not causal, for encoders.
//
// The order of every sum is part of the interface: a row's output depends on its query, on the keys
// and values that it sees, and on nothing else, to the last bit.
//  - Keys are walked in splits of kSplit tokens, at absolute positions that are multiples of it.
//  - In a split: scores are summed over the head dimension in order, one token a lane; the maximum
//    is exact; the weights' sum has one lane per token mod 16 and reduce_add's tree; values are added
//    token by token, one element of the head dimension a lane.
//  - Where factors are rounded, two elements of the head dimension, or two tokens, are a step: at even
//  positions and
//    the one behind, the second added before the first, which is what vdpbf16ps does. The sum of weights is
//    that of unrounded ones.
//  - Of a cache of codes, a score is times its key's scale, too, and a weight times its value's.
//  - Splits are merged in order, by merge().
// Tiles of pairs, register tiles and threads only choose which of these chains advance together.
// A pair is one query row and one query head.
#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/table.h"

namespace engine::cpu {
namespace ENGINE_ISA {
namespace {

struct Tile {
  int count;
  bool is_partial;
  float* out[kTile];
  int64_t partial[kTile];  // where the result of split 0 would lie
  int64_t position[kTile];
  int64_t newest[kTile];  // the last key that is seen
  float maximum[kTile];
  float sum[kTile];  // of the weights, relative to `maximum`, as `values` are
  alignas(64) float query[kTile][kMaxHeadDim];
  alignas(64) float values[kTile][kMaxHeadDim];
};

// The place of a pair's result of one split.
ENGINE_INLINE float* partial_of(const PagedAttentionArgs& args, const Tile& tile, int pair, int64_t split) {
  return args.partials + tile.partial[pair] + split * args.H * partial_floats(args.D);
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

// Keeps a split's result until another unit joins it.
ENGINE_INLINE void keep(float* partial, int64_t D, float maximum, float sum, const float* values) {
  for (int64_t d = 0; d < D; d += 16) store(partial + d, load(values + d));
  partial[D] = maximum;
  partial[D + 1] = sum;
}

// R pairs of the tile against one split.
template <int R, typename Element>
void attend_pairs(const PagedAttentionArgs& args, Tile& tile, int first, const Split<Element>& split,
                  const Split<Element>& next, Scratch& scratch) {
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
  if (kRowsPerStep<Element> == 2) common = {(common.begin + 1) / 2 * 2, common.end / 2 * 2};
  score<R>(args, tile.query + first, split, {any.begin / kGroup, (any.end + kGroup - 1) / kGroup}, scratch);
  float maximum[R], sum[R];
  for (int r = 0; r < R; ++r) {
    if (seen[r].end <= seen[r].begin) continue;
    weigh<Element>(scratch.scores[r], seen[r], args.softcap, maximum[r], sum[r]);
    scale_weights(split, seen[r], args.S, scratch.scores[r]);
    for (int64_t d = 0; d < args.D; d += 16) store(&scratch.values[r][d], zero());
    // Values that only some of the pairs see are added pair by pair, so that nobody reads, not even
    // with weight zero, a value that it does not see.
    const int64_t alone_end = common.begin < common.end ? common.begin : seen[r].end;
    const Range alone = {seen[r].begin, alone_end};
    add_values<1>(args, split, next, alone, &scratch.scores[r], &scratch.values[r]);
  }
  if (common.begin < common.end) {
    add_values<R>(args, split, next, common, scratch.scores, scratch.values);
    for (int r = 0; r < R; ++r) {
      const Range alone = {common.end, seen[r].end};
      add_values<1>(args, split, next, alone, &scratch.scores[r], &scratch.values[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    if (seen[r].begin >= seen[r].end) continue;
    const int pair = first + r;
    if (tile.is_partial) {
      float* partial = partial_of(args, tile, pair, split.begin / kSplit);
      keep(partial, args.D, maximum[r], sum[r], scratch.values[r]);
    } else {
      merge(tile, pair, args.D, maximum[r], sum[r], scratch.values[r]);
    }
  }
}

template <typename Element>
ENGINE_INLINE void attend_split(const PagedAttentionArgs& args, Tile& tile, const Split<Element>& split,
                                const Split<Element>& next, Scratch& scratch) {
  const int num_parts = (tile.count + kMaxRows - 1) / kMaxRows;
  for (int part = 0; part < num_parts; ++part) {
    const int first = tile.count * part / num_parts;
    switch (tile.count * (part + 1) / num_parts - first) {
      case 1: attend_pairs<1>(args, tile, first, split, next, scratch); break;
      case 2: attend_pairs<2>(args, tile, first, split, next, scratch); break;
      case 3: attend_pairs<3>(args, tile, first, split, next, scratch); break;
      case 4: attend_pairs<4>(args, tile, first, split, next, scratch); break;
#if ENGINE_ISA_avx512
      case 5: attend_pairs<5>(args, tile, first, split, next, scratch); break;
      case 6: attend_pairs<6>(args, tile, first, split, next, scratch); break;
      case 7: attend_pairs<7>(args, tile, first, split, next, scratch); break;
      case 8: attend_pairs<8>(args, tile, first, split, next, scratch); break;
#endif
    }
  }
}

// Keys and values of KV head g. Groups without a token in `tokens` (absolute) are given the nearest one that
// has: nobody reads them, but they may be prefetched.
template <typename Element>
ENGINE_INLINE void locate(const PagedAttentionArgs& args, const int32_t* block_table, int64_t g, Range tokens,
                          int64_t begin, Split<Element>& split) {
  split.begin = begin;
  for (int64_t group = 0; group < kSplit / kGroup; ++group) {
    const int64_t token = most(least(begin + group * kGroup, tokens.end - 1), tokens.begin);
    const int64_t block_id = block_table[token / args.S];
    const int64_t offset = token % args.S / kGroup * kGroup;
    split.keys[group] = static_cast<const Element*>(args.k_cache) + block_id * args.k_block_stride +
                        g * args.D * args.S + offset;
    split.values[group] = static_cast<const Element*>(args.v_cache) + block_id * args.v_block_stride +
                          (g * args.S + offset) * args.D;
    if constexpr (kIsQuantized<Element>) {
      split.scales[group] = args.kv_scales + block_id * args.scales_block_stride + 2 * g * args.S + offset;
    }
  }
}

// The pairs of a unit, with nothing attended to but the sinks; returns all tokens that they see.
template <typename Element>
ENGINE_INLINE Range open_tile(const PagedAttentionArgs& args, const AttentionUnit& unit, int64_t g,
                              Tile& tile) {
  const int64_t heads_per_group = args.H / args.G;
  tile.count = unit.num_pairs;
  tile.is_partial = unit.is_partial;
  Range seen = {args.rows[unit.first_row].position, 0};
  for (int i = 0; i < tile.count; ++i) {
    const int64_t pair = unit.first_pair + i;
    const AttentionRow& row = args.rows[unit.first_row + pair / heads_per_group];
    const int64_t head = g * heads_per_group + pair % heads_per_group;
    const float* query = args.q + row.row * args.q_stride + head * args.D;
    tile.out[i] = args.out + row.row * args.out_stride + head * args.D;
    tile.partial[i] = row.partials + (head - row.first_split * args.H) * partial_floats(args.D);
    tile.position[i] = row.position;
    tile.newest[i] = row.newest;
    tile.maximum[i] = args.sinks == nullptr ? kMinusInfinity : args.sinks[head];
    tile.sum[i] = args.sinks == nullptr ? 0.0f : 1.0f;
    for (int64_t d = 0; d < args.D; d += 16) {
      store_factors<Element>(tile.query[i], d, load(query + d));
      store(&tile.values[i][d], zero());
    }
    const int64_t oldest = args.window > 0 ? most(row.position - args.window + 1, 0) : 0;
    seen = {least(seen.begin, oldest), most(seen.end, row.newest + 1)};
  }
  return seen;
}

// Joins the splits that other units computed.
ENGINE_INLINE void join_partials(const PagedAttentionArgs& args, const AttentionUnit& unit, Tile& tile) {
  const int64_t heads_per_group = args.H / args.G;
  for (int i = 0; i < tile.count; ++i) {
    const AttentionRow& row = args.rows[unit.first_row + (unit.first_pair + i) / heads_per_group];
    for (int64_t split = row.first_split; split < row.first_split + row.num_partials; ++split) {
      const float* partial = partial_of(args, tile, i, split);
      merge(tile, i, args.D, partial[args.D], partial[args.D + 1], partial);
    }
  }
}

ENGINE_INLINE void close_tile(const Tile& tile, int64_t D) {
  for (int i = 0; i < tile.count; ++i) {
    const Vec16 sum = set1(tile.sum[i]);
    for (int64_t d = 0; d < D; d += 16) store(tile.out[i] + d, div(load(&tile.values[i][d]), sum));
  }
}

template <typename Element>
ENGINE_INLINE void attend(const PagedAttentionArgs& args, const AttentionUnit& unit, int64_t g) {
  Tile tile;
  const Range seen = open_tile<Element>(args, unit, g, tile);
  if (!tile.is_partial) join_partials(args, unit, tile);
  const int32_t* block_table = args.block_tables + unit.sequence * args.block_tables_stride;
  const Range tokens = {most(seen.begin, unit.first_split * kSplit), least(seen.end, unit.end_split * kSplit)};
  Scratch scratch;
  Split<Element> splits[2];
  if (unit.first_split < unit.end_split) {
    Split<Element>& first = splits[unit.first_split % 2];
    locate(args, block_table, g, tokens, unit.first_split * kSplit, first);
    if (tile.count <= kMaxRows) {  // more pairs multiply for longer than keys take to come
      prefetch_keys(args, first, (least(tokens.end - first.begin, kSplit) + kGroup - 1) / kGroup);
    }
  }
  for (int64_t split = unit.first_split; split < unit.end_split; ++split) {
    const bool is_last = split + 1 == unit.end_split;
    if (!is_last) locate(args, block_table, g, tokens, (split + 1) * kSplit, splits[(split + 1) % 2]);
    attend_split(args, tile, splits[split % 2], splits[is_last ? split % 2 : (split + 1) % 2], scratch);
  }
  if (!tile.is_partial) close_tile(tile, args.D);
}

ENGINE_INLINE void attend_bf16(const PagedAttentionArgs& args, const AttentionUnit& unit, int64_t g) {
  switch (args.factors) {
    case AttentionFactors::kFloat32: return attend<uint16_t>(args, unit, g);
    case AttentionFactors::kRounded: return attend<RoundedBf16>(args, unit, g);
    case AttentionFactors::kRoundedDot:
#if ENGINE_ISA_avx512
      return attend<DotBf16>(args, unit, g);
#else
      return;  // not asked of other sets
#endif
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const AttentionUnit& unit = args.units[item / args.G];
    const int64_t g = item % args.G;
    switch (args.format) {
      case CacheFormat::kFloat32: attend<float>(args, unit, g); break;
      case CacheFormat::kBFloat16: attend_bf16(args, unit, g); break;
      case CacheFormat::kInt8: attend<int8_t>(args, unit, g); break;
    }
  }
}

}  // namespace ENGINE_ISA
}  // namespace engine::cpu
